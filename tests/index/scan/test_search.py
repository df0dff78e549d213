"""Candidates of the scan: entries in order, and the right ones whatever the sample says."""

import numba
import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like, recall
from scan_codes import decoded

from retrieval_attn.index import build_index
from retrieval_attn.index.scan import search
from retrieval_attn.index.scan.entries import as_entry, keep_best, key_of, order_of, score_at, write_best
from retrieval_attn.index.scan.rescore import gather
from retrieval_attn.index.scan.search import find_candidates

SCORES = np.array([np.inf, 3e38, 1.5, 1.4999999, 1e-45, 0.0, -1e-45, -1.5, -3e38, -np.inf], np.float32)


def entries_of(scores, keys):
    bits = np.asarray(scores, np.float32).view(np.int32)
    return np.array([as_entry(b, k) for b, k in zip(bits, keys, strict=True)], np.int64)


def test_entries_are_ordered_by_score_then_by_smaller_key():
    entries = entries_of(np.repeat(SCORES, 3), [0, 7, 2**31 - 1] * len(SCORES))
    assert (np.diff(entries) < 0).all()
    assert [key_of(e) for e in entries[:3]] == [0, 7, 2**31 - 1]
    assert [score_at(order_of(e)) for e in entries[::3]] == SCORES.tolist()
    assert entries_of([-0.0], [5]) == entries_of([0.0], [5])


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("order", [np.sort, lambda x: np.sort(x)[::-1].copy(), lambda x: x])
def test_the_best_come_to_the_front(n, order):
    entries = order(np.random.default_rng(n).permutation(n).astype(np.int64) - n // 2)
    for k in {1, 2, n // 3, n - 1, n} & set(range(1, n + 1)):
        mine = entries.copy()
        keep_best(mine, n, k)
        assert sorted(mine[:k]) == sorted(entries)[n - k :]
        assert sorted(mine) == sorted(entries)


def test_the_best_are_written_in_order():
    ids, scores = np.empty(4, np.int32), np.empty(4, np.float32)
    write_best(entries_of([1, 5, -2, 5, 0, -7], [10, 11, 12, 9, 14, 15]), ids, scores)
    assert ids.tolist() == [9, 11, 10, 14]
    assert scores.tolist() == [5, 5, 1, 0]


def planted(good, n_keys=20_000):
    """Keys of which `good` score 100 and more, the larger their id, and the others almost nothing; and a query."""
    keys = np.random.default_rng(0).standard_normal((1, n_keys, 16), dtype=np.float32)
    keys[..., 0] *= 0.1
    keys[0, good, 0] = 100 + np.arange(len(good)) / len(good)
    q = np.zeros((2, 16), np.float32)
    q[:, 0] = 1
    return keys, q


def candidates(index, q, n_wanted):
    """The entries found for each query of up to four."""
    keys, codes, *_ = index._state
    entries, counts = find_candidates(keys, codes, index._state.map.queries, q[None], 0, len(q), 100, n_wanted)
    chunks = range(entries.shape[2])
    return [np.concatenate([entries[0, 0, i, row, : counts[0, 0, i, row]] for i in chunks]) for row in range(len(q))]


@pytest.mark.parametrize(
    "good",
    [
        np.arange(16),  # only in blocks that are sampled: few keys reach the floor
        np.arange(9000, 9030),
        np.arange(16, 19_000),  # nearly everywhere
        np.arange(12_000, 20_000),  # all in the last chunks
        np.concatenate([np.arange(16 * b, 16 * b + 16) for b in range(1, 1250, 3)]),  # only where the sample is blind
    ],
    ids=["sampled", "few", "most", "late", "hidden"],
)
@pytest.mark.parametrize("n_wanted", [100, 250])
def test_a_misleading_sample_costs_time_but_no_key(good, n_wanted):
    keys, q = planted(good)
    index = build_index("scan", keys, dims=16)
    for found, everything in zip(candidates(index, q, n_wanted), candidates(index, q, 20_000), strict=True):
        assert np.isin(np.sort(everything)[-max(100, n_wanted // 2) :], found).all()
        assert len(np.unique(found)) == len(found)
        assert len(everything) == 20_000


def test_what_a_misleading_sample_leaves_does_not_depend_on_the_number_of_chunks(monkeypatch):
    """A chunk in which many passed kept so few that all chunks together seemed to have found few."""
    sampled = np.concatenate([np.arange(16), np.arange(15 * 16, 16 * 16)])
    hidden = np.concatenate([np.arange(16 * b, 16 * b + 16) for b in range(120, 190) if b % 15])
    keys, q = planted(np.concatenate([sampled, hidden]))
    # So the floor lies below all that are hidden, and above the others.
    keys[0, sampled, 0] = 60
    keys_, codes, maps, *_ = build_index("scan", keys, dims=16)._state
    monkeypatch.setattr(search, "MIN_CHUNK", 1000)

    def left(n_threads):
        monkeypatch.setattr(numba, "get_num_threads", lambda: n_threads)
        entries, counts = find_candidates(keys_, codes, maps.queries, q[None], 0, 1, 100, 250)
        assert entries.shape[2] == 4 * n_threads
        return sorted(gather(entries[0, 0, :, 0], counts[0, 0, :, 0], 250))

    assert left(1) == left(2) == left(4)


def test_estimates_are_inner_products_of_what_the_codes_stand_for():
    scene = attention_like(n_keys=3000)
    index = build_index("scan", scene.keys, scene.queries)
    for row, found in enumerate(candidates(index, scene.later[:2, 0], 3000)):
        q = index._state.map.queries[0] @ scene.later[row, 0]
        true = decoded(index._state.codes, 0) @ q
        unit = np.abs(q).max() / 127
        estimates = unit * np.array([score_at(order_of(entry)) for entry in found])
        assert len(found) == 3000
        # Queries are rounded to 127 steps: half a step for each coordinate, most of which cancels.
        assert np.abs(estimates - true[[key_of(entry) for entry in found]]).max() < 0.03 * true.std()


def test_keys_that_were_cut_off_are_not_found_though_their_block_stays():
    keys, q = planted(np.arange(19_993, 20_000))
    index = build_index("scan", keys, dims=16)
    assert (index.search(q, k=5).ids >= 19_993).all()
    index.truncate(19_993)
    assert index.search(q, k=5).ids.max() < 19_993


def test_results_do_not_depend_on_the_number_of_threads():
    scene = attention_like(n_keys=30_000)
    index = build_index("scan", as_bfloat16(scene.keys), scene.queries)
    several = index.search(scene.later[:, 0], k=50)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = index.search(scene.later[:, 0], k=50)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(several.ids, one.ids)
    np.testing.assert_array_equal(several.scores, one.scores)


@pytest.mark.parametrize("effort", [50, 60, 150])
def test_small_efforts_still_fill_the_result(effort):
    scene = attention_like(n_keys=6000)
    index = build_index("scan", scene.keys, scene.queries)
    hit = index.search(scene.later, k=50, effort=effort)
    exact = build_index("exact", scene.keys).search(scene.later, k=50)
    assert (hit.ids >= 0).all()
    assert recall(hit.ids, exact.ids) > 0.5 + 0.4 * (effort > 100)
