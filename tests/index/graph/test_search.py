"""The beam: its packed entries, and the search against a plain one."""

import heapq

import numpy as np
import pytest
from index_vectors import attention_like

from retrieval_attn.compiled import jit
from retrieval_attn.index.graph import search
from retrieval_attn.index.graph.cells import grow_cells
from retrieval_attn.index.graph.metric import fit_metric
from retrieval_attn.index.keys import HeadKeys
from retrieval_attn.index.protocol import Steps


@jit()
def packed(scores, ids):
    out = np.empty(len(scores), np.uint64)
    for i in range(len(scores)):
        out[i] = search.pack(scores[i], ids[i])
    return out


@jit()
def unpacked(entries, scores, ids):
    for i in range(len(entries)):
        scores[i] = search.unpack_score(entries[i])
        ids[i] = search.unpack_id(entries[i])


def test_packed_entries_sort_best_first_then_by_id_and_come_back():
    rng = np.random.default_rng(0)
    scores = np.concatenate(
        [rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500), [0.0, 1.0, 1.0, -1.0, -1.0]]
    )
    scores = scores.astype(np.float32)
    ids = rng.permutation(len(scores)).astype(np.int32)
    ids[0] = 2**31 - 1
    entries = packed(scores, ids)
    np.testing.assert_array_equal(np.argsort(entries, kind="stable"), np.lexsort((ids, -scores)))
    back = np.empty_like(scores), np.empty_like(ids)
    unpacked(entries, *back)
    np.testing.assert_array_equal(back[0], scores)
    np.testing.assert_array_equal(back[1], ids)


def plain_search(keys, links, starts, q, effort):
    scores = keys.astype(np.float64) @ q.astype(np.float64)
    seen = set(starts)
    beam = heapq.nlargest(effort, ((scores[i], i) for i in seen))
    followed = set()
    while todo := [i for _, i in beam if i not in followed]:
        followed.add(todo[0])
        new = [i for i in links[todo[0]] if i >= 0 and i not in seen]
        seen.update(new)
        beam = heapq.nlargest(effort, beam + [(scores[i], i) for i in new])
    return [i for _, i in beam], len(seen)


def plain_leaves(tree, q, n_keys):
    """The leaves of the most promising cells that promise most themselves."""
    reach = search.OPTIMISM * np.linalg.norm(q)
    n_members, n_cells, n_leaves = len(tree.members), len(tree.centroids), len(tree.codes)
    hopes = tree.centroids @ q + reach * tree.spreads
    probed = np.argsort(-hopes)[: 1 + search.N_PROBED * n_keys * n_cells // n_members]
    leaves = np.concatenate([np.arange(*tree.first_leaves[c : c + 2]) for c in probed])
    cell = np.repeat(np.arange(n_cells), np.diff(tree.first_leaves))
    means = tree.centroids[cell] + tree.codes * tree.units[:, None]
    hopes = means @ q + reach * tree.leaf_spreads
    return leaves[np.argsort(-hopes[leaves])][: 1 + n_keys * n_leaves // n_members]


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=3000, n_later=8)


@pytest.fixture(scope="module")
def tree(scene):
    metric = fit_metric(scene.keys[0], scene.queries[0])
    return grow_cells(scene.keys[0], metric.points(scene.keys[0]), 0, 4, [0], Steps())


def run(keys, tree, links, starts, q, effort, k=80, n_keys=None, bonus=None):
    ids, scores = np.empty(k, np.int32), np.empty(k, np.float32)
    bonus = np.empty(0, np.float32) if bonus is None else bonus
    starts = np.array(starts, np.int32)
    rows = HeadKeys(keys.ravel(), 0, keys.shape[1], bonus)
    n = search.search_one(rows, tree, 0, links, n_keys or len(keys), starts, q, effort, ids, scores)
    return ids, scores, n


@pytest.mark.parametrize("n_keys", [1, 8, 100, 10_000])
def test_the_most_promising_leaves_come_first(scene, tree, n_keys):
    for q in scene.later[0]:
        found = search.best_leaves(tree, 0, q, n_keys)
        expected = plain_leaves(tree, q, n_keys)
        assert len(found) == len(expected)
        # Rounding may swap leaves of nearly one promise.
        assert np.isin(expected, found).mean() > 0.97


def test_the_search_is_the_plain_one(scene, tree):
    keys = scene.keys[0]
    links = np.random.default_rng(1).integers(0, 3000, (3000, 6)).astype(np.int32)
    links[:, 4:] = -1
    for effort in (1, 10, 60):
        for q in scene.later[0]:
            leaves = search.best_leaves(tree, 0, q, effort * search.N_FIRST)
            begun = np.concatenate([tree.members[slice(*tree.first_members[x : x + 2])] for x in leaves])
            ids, _, n = run(keys, tree, links, [5, 9, -1, 5], q, effort)
            expected, visited = plain_search(keys, links, [5, 9, *begun], q, effort)
            assert ids[: len(expected)].tolist() == expected[:80]
            assert (ids[len(expected) :] == -1).all()
            assert n == visited


def test_a_bonus_counts_as_part_of_the_score(scene, tree):
    """The tree is that of lifted keys; one key that scores little has a bonus that makes it the best."""
    keys, q = scene.keys[0], scene.later[0, 0]
    bonus = np.random.default_rng(0).exponential(5, 3000).astype(np.float32)
    bonus[int((keys @ q).argmin())] = 1000
    lifted = np.concatenate([keys, bonus[:, None]], axis=1)
    asked = np.concatenate([scene.queries[0], np.ones((len(scene.queries[0]), 1), np.float32)], axis=1)
    metric = fit_metric(lifted, asked)
    grown = grow_cells(lifted, metric.points(lifted), 0, 4, [0], Steps())
    links = np.full((3000, 6), -1, np.int32)
    ids, scores, n = run(keys, grown, links, [], np.append(q, np.float32(1)), 30, k=10, bonus=bonus)
    whole = keys @ q + bonus
    assert ids[0] == whole.argmax() == (keys @ q).argmin()
    np.testing.assert_allclose(scores, whole[ids], rtol=1e-4, atol=1e-3)
    assert n < 700


def test_keys_it_does_not_know_are_skipped(scene, tree):
    keys = scene.keys[0]
    links = np.tile(np.arange(2500, 3000, dtype=np.int32), (3000, 1))
    ids, _, n = run(keys, tree, links, [2999, 10**6], scene.later[0, 0], 500, k=200, n_keys=2800)
    assert ids.max() < 2800
    assert n <= 2800
