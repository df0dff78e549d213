"""The scan of codes against exact search."""

import numpy as np
import pytest
from index_vectors import STORED, as_bfloat16, attention_like, every_stored, recall
from laws import some_of

from retrieval_attn.index import build_index
from retrieval_attn.index.scan.codes import NOT_A_NUMBER


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=12_000)


@pytest.fixture(scope="module")
def index(scene):
    return build_index("scan", as_bfloat16(scene.keys), scene.queries)


@pytest.fixture(scope="module")
def exact(scene):
    return build_index("exact", as_bfloat16(scene.keys)).search(scene.later, k=100)


def test_almost_everything_is_found_without_being_asked(scene, index, exact):
    hit = index.search(scene.later, k=100)
    assert recall(hit.ids, exact.ids) > 0.98
    assert (hit.visited == 12_000).all()


def test_more_effort_finds_more(scene, index, exact):
    found = [recall(index.search(scene.later, k=100, effort=e).ids, exact.ids) for e in (110, 300, 1000, 3000)]
    assert found == sorted(found)
    assert found[-1] > 0.999


def test_enough_effort_is_exact(scene, index, exact):
    hit = index.search(scene.later, k=100, effort=12_000)
    np.testing.assert_array_equal(hit.ids, exact.ids)
    np.testing.assert_array_equal(hit.scores, exact.scores)


def test_the_index_is_small(scene, index):
    assert index.nbytes < 0.25 * 2 * as_bfloat16(scene.keys).nbytes


@every_stored
@pytest.mark.parametrize(("n_keys", "group", "dim"), some_of([63, 1000, 4007], [1, 3], [6, 24, 100]))
def test_odd_shapes(dtype, dim, group, n_keys):
    scene = attention_like(2 * group, 2, n_keys, 16, 5, dim=dim)
    keys = STORED[dtype](scene.keys)
    k = max(2, n_keys // 40)
    hit = build_index("scan", keys, scene.queries).search(scene.later, k=k, effort=n_keys // 3)
    exact = build_index("exact", keys).search(scene.later, k=k)
    assert recall(hit.ids, exact.ids) > 0.98
    assert hit.ids.max() < n_keys


def test_many_queries_at_once(scene, index):
    """More than one pass takes; each query as if it were alone."""
    many = index.search(np.tile(scene.later, (1, 5, 1))[:, :150], k=20)
    once = index.search(scene.later, k=20)
    for start in (0, 32, 96):
        np.testing.assert_array_equal(many.ids[:, start : start + 32], once.ids)
        np.testing.assert_array_equal(many.scores[:, start : start + 32], once.scores)


@pytest.mark.parametrize("effort", [700, 2000])
def test_bonuses_are_ranked_unquantised(scene, effort):
    """With this scale bonuses decide as much as scores do."""
    keys = as_bfloat16(scene.keys[:, :9001])
    lifted = build_index("scan", keys, scene.queries, seed=3, lift=0.02).search(scene.later, k=100, effort=effort)
    plain = build_index("exact", keys).search(scene.later, k=100)
    exact = build_index("exact", keys, seed=3, lift=0.02).search(scene.later, k=100)
    assert recall(exact.ids, plain.ids) < 0.8
    assert recall(lifted.ids, exact.ids) > 0.98
    np.testing.assert_allclose(lifted.scores[..., :20], exact.scores[..., :20], rtol=1e-4, atol=1e-3)


def test_bonuses_grow_with_the_keys(scene):
    keys = scene.keys[:, :5000]
    index = build_index("scan", keys[:, :4000], scene.queries, lift=0.02)
    for start in (4000, 4001, 4017, 4500):
        stop = {4000: 4001, 4001: 4017, 4017: 4500, 4500: 5000}[start]
        index.append(keys[:, start:stop])
    exact = build_index("exact", keys, lift=0.02).search(scene.later, k=50)
    assert recall(index.search(scene.later, k=50, effort=1500).ids, exact.ids) > 0.98


def test_appended_keys_are_found_like_the_first(scene, exact):
    keys = as_bfloat16(scene.keys)
    index = build_index("scan", keys[:, :8000].copy(), scene.queries)
    for at in range(8000, 12_000, 1000):
        for i in range(at, at + 5):
            index.append(keys[:, i : i + 1])
        index.append(keys[:, at + 5 : at + 1000])
    assert recall(index.search(scene.later, k=100).ids, exact.ids) > 0.97
    at_full_effort = index.search(scene.later, k=100, effort=12_000)
    np.testing.assert_array_equal(at_full_effort.ids, exact.ids)


def test_the_callers_buffer_is_used_in_place(scene):
    buffer = as_bfloat16(scene.keys)
    index = build_index("scan", buffer[:, :10_000], scene.queries)
    index.append(buffer[:, 10_000:10_020], keys=buffer[:, :10_020])
    assert np.shares_memory(index._state.keys.array, buffer)
    assert index.n_keys == 10_020


def test_a_giant_key_hides_no_other(scene):
    keys = scene.keys.copy()
    keys[:, 777] *= 1000
    hit = build_index("scan", keys, scene.queries).search(scene.later, k=100)
    exact = build_index("exact", keys).search(scene.later, k=100)
    assert recall(hit.ids, exact.ids) > 0.97
    wins = exact.ids[..., 0] == 777
    assert 0.1 < wins.mean() < 0.9
    # Where it is almost at right angles to the query, four bits cannot tell whether it wins or loses.
    assert np.mean((hit.ids[..., 0] == 777) == wins) > 0.98


def test_a_key_whose_coordinates_overflow_is_always_looked_at(scene):
    keys, q = scene.keys.copy(), np.zeros((4, 64), np.float32)
    keys[:, 777] = 2e38
    q[:, 0] = 1
    index = build_index("scan", keys, scene.queries)
    assert (index._state.codes.factors[:, 777] == NOT_A_NUMBER).all()
    assert (index.search(q, k=10).ids[:, 0] == 777).all()


def test_equal_keys_come_in_order_of_their_ids():
    keys = np.ones((1, 9000, 16), np.float32)
    for one in (keys, 0 * keys):
        hit = build_index("scan", one).search(np.ones((4, 16), np.float32), k=50)
        np.testing.assert_array_equal(hit.ids, np.tile(np.arange(50), (4, 1)))


def test_duplicates_are_all_found():
    scene = attention_like(n_keys=300)
    keys = np.repeat(scene.keys, 40, axis=1)
    hit = build_index("scan", keys, scene.queries).search(scene.later, k=100)
    exact = build_index("exact", keys).search(scene.later, k=100)
    assert (hit.scores >= exact.scores[..., -1:] - 1e-3).mean() > 0.99


def test_a_query_of_zeros_gets_any_keys(index):
    hit = index.search(np.zeros((4, 64), np.float32), k=30)
    assert (hit.scores == 0).all()
    assert all(len(set(row)) == 30 for row in hit.ids)


@pytest.mark.parametrize("later", ["drifted", "unasked"])
def test_queries_unlike_the_sample_are_served(scene, later):
    """The sample comes from other heads' interests, or there is none."""
    keys = as_bfloat16(scene.keys)
    queries = scene.queries[::-1].copy() if later == "drifted" else None
    index = build_index("scan", keys, queries)
    exact = build_index("exact", keys).search(scene.later, k=100)
    assert recall(index.search(scene.later, k=100, effort=1000).ids, exact.ids) > 0.97


def test_dims_are_followed(scene):
    keys = as_bfloat16(scene.keys)
    few, many = (build_index("scan", keys, scene.queries, dims=dims) for dims in (8, 64))
    assert few.nbytes < many.nbytes / 2
    with pytest.raises(ValueError, match="dims must be at least 1, got 0"):
        build_index("scan", keys, dims=0)
