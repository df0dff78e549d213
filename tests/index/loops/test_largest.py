"""The largest of many by counting: which ones, in rising order of position, ties to the first."""

import numpy as np
import pytest

from retrieval_attn.index.loops.largest import choose


def chosen(values, n):
    out = np.full(n, -1, np.int64)
    choose(np.asarray(values, np.float32), out)
    return out.tolist()


def defined(values, n):
    return sorted(np.argsort(-np.asarray(values, np.float32), kind="stable")[:n].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_is_the_start_of_a_stable_sort(seed):
    rng = np.random.default_rng(seed)
    values = rng.choice([rng.standard_normal(4), rng.standard_normal(200)][seed % 2], 300)
    for n in (1, 2, 17, 150, 299, 300):
        assert chosen(values, n) == defined(values, n)


def test_of_equal_values_the_first_are_taken():
    assert chosen([1, 3, 2, 3, 3, 2], 2) == [1, 3]
    assert chosen([1, 3, 2, 3, 3, 2], 4) == [1, 2, 3, 4]
    assert chosen([5] * 7, 3) == [0, 1, 2]


def test_both_zeros_are_equal_and_negative_numbers_fall():
    assert chosen([-0.0, 0.0, -0.0], 2) == [0, 1]
    assert chosen([-3, -1e-40, -1e38, -np.inf, -2], 2) == [1, 4]
    assert chosen([-np.inf, np.inf, 3e38, -np.inf], 3) == [0, 1, 2]


def test_none_are_wanted():
    assert chosen([1, 2], 0) == []
