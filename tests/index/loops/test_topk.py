"""The bounded heap."""

import numpy as np
import pytest

from retrieval_attn.index.loops.topk import best_first, offer, offer_run


@pytest.mark.parametrize("limit", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_a_heap_keeps_the_best_in_order(limit, order):
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 40, 200).astype(np.float32)
    stream = {"random": stream, "rising": np.sort(stream), "falling": -np.sort(-stream), "equal": 0 * stream}[order]
    expected = np.lexsort((np.arange(200), -stream))[:limit]
    for way in ("one by one", "run"):
        scores, ids = np.empty(limit, np.float32), np.empty(limit, np.int32)
        n = 0
        if way == "run":
            for first in range(0, 200, 90):
                n = offer_run(scores, ids, n, stream[first : first + 90], first)
        else:
            for key in rng.permutation(200):
                n = offer(scores, ids, n, stream[key], key)
        best_first(scores, ids, n)
        assert n == min(limit, 200)
        np.testing.assert_array_equal(ids[:n], expected)
        np.testing.assert_array_equal(scores[:n], stream[expected])
