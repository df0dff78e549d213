"""The beam: its packed entries, and the search against a plain one."""

import heapq

import numpy as np
from test_index_vectors import attention_like

from retrieval_attn.host import jit
from retrieval_attn.index import graph_search as search


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


def test_the_search_is_the_plain_one():
    scene = attention_like(n_keys=600, n_later=8)
    keys = scene.keys[0]
    links = np.random.default_rng(1).integers(0, 600, (600, 6)).astype(np.int32)
    links[:, 4:] = -1
    starts = np.array([5, 9, -1, 5], np.int32)
    for effort in (1, 10, 60):
        for q in scene.later[0]:
            ids, scores = np.empty(80, np.int32), np.empty(80, np.float32)
            n = search.search_one(keys.ravel(), 0, 64, 600, links, starts, q, False, effort, ids, scores)
            expected, visited = plain_search(keys, links, [5, 9], q, effort)
            assert ids[: len(expected)].tolist() == expected
            assert (ids[len(expected) :] == -1).all()
            assert n == visited


def test_by_distance_it_finds_the_nearest():
    keys = attention_like(n_keys=300).keys[0]
    links = np.tile(np.arange(300, dtype=np.int32), (300, 1))
    ids, scores = np.empty(5, np.int32), np.empty(5, np.float32)
    search.search_one(keys.ravel(), 0, 64, 300, links, np.zeros(1, np.int32), keys[70], True, 50, ids, scores)
    squares = ((keys - keys[70]) ** 2).sum(axis=1)
    assert ids.tolist() == np.argsort(squares)[:5].tolist()
    np.testing.assert_allclose(-scores, np.sort(squares)[:5], rtol=1e-4, atol=1e-4)


def test_links_to_keys_it_does_not_know_are_skipped():
    keys = attention_like(n_keys=300).keys[0]
    links = np.tile(np.arange(300, dtype=np.int32), (300, 1))
    ids, scores = np.empty(300, np.int32), np.empty(300, np.float32)
    n = search.search_one(keys.ravel(), 0, 64, 200, links, np.zeros(1, np.int32), keys[7], False, 300, ids, scores)
    assert n == 200
    assert ids.max() == 199
