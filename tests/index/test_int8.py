"""int8 keys: plain numbers, which every kind finds as it finds the same numbers in a wider dtype."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from index_vectors import as_bfloat16, attention_like, recall
from laws import rarely

from retrieval_attn.index import build_index, load_index, storage
from retrieval_attn.index.page.summary import SCORES

# Graph and page are compiled for int8 for nothing else.
every_kind = pytest.mark.parametrize("kind", ["exact", "ivf", "scan", *rarely("graph", "page")])

FIRST = 2500


class Numbers(NamedTuple):
    """Whole numbers, small enough that no inner product is rounded, in whatever order it is summed.

    keys (G, S, D) int8, wide (G, S, D) float32; queries and later float32, as in `Scene`.
    """

    keys: np.ndarray
    wide: np.ndarray
    queries: np.ndarray
    later: np.ndarray


@pytest.fixture(scope="module")
def scene():
    scene = attention_like(n_keys=4000)
    keys = whole(scene.keys, 127).astype(np.int8)
    return Numbers(keys, keys.astype(np.float32), whole(scene.queries, 200), whole(scene.later, 200))


def whole(x, largest):
    return np.rint(x / np.abs(x).max(axis=(1, 2), keepdims=True) * largest).astype(np.float32)


def options(kind):
    """Summaries that are stored exactly in either dtype; a graph that links early."""
    return {"page": {"score": "minmax"}, "graph": {"tail": 150}}.get(kind, {})


def same(kind, a, b, queries):
    for k, effort in ((20, None), (40, 60)):
        ours, theirs = (x.search(queries, k, effort=effort) for x in (a, b))
        if kind == "scan":
            # Codes come from coordinates that are no whole numbers: sums may be rounded otherwise on their way.
            assert recall(ours.ids, theirs.ids) > 0.99
        else:
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.scores, theirs.scores)
        np.testing.assert_array_equal(ours.visited, theirs.visited)


@every_kind
@pytest.mark.parametrize("lift", [None, 2e-4])
def test_found_as_in_float32(kind, lift, scene):
    ours = build_index(kind, scene.keys, scene.queries, lift=lift, **options(kind))
    theirs = build_index(kind, scene.wide, scene.queries, lift=lift, **options(kind))
    same(kind, ours, theirs, scene.later)


@every_kind
def test_scores_are_inner_products_of_the_numbers(kind, scene):
    hit = build_index(kind, scene.keys, scene.queries).search(scene.later, 50)
    rows = np.repeat(scene.keys, 2, axis=0)[np.arange(4)[:, None, None], hit.ids].astype(np.int64)
    np.testing.assert_array_equal(hit.scores, np.einsum("htd,htkd->htk", scene.later.astype(np.int64), rows))


@every_kind
@pytest.mark.parametrize("in_place", [True, False])
def test_grown_and_cut_as_in_float32(kind, in_place, scene):
    def went(keys):
        index = build_index(kind, keys[:, :FIRST], scene.queries, **options(kind))
        for begin, end in ((FIRST, 2501), (2501, 2700), (2700, 3900)):
            index.append(keys[:, begin:end], keys=keys[:, :end] if in_place else None)
        index.truncate(3333)
        index.append(keys[:, 3333:], keys=keys if in_place else None)
        return index

    same(kind, went(scene.keys), went(scene.wide), scene.later)


@every_kind
@pytest.mark.parametrize("with_keys", [True, False])
def test_saved_and_loaded(kind, with_keys, scene, tmp_path):
    index = build_index(kind, scene.keys[:, :FIRST], scene.queries)
    index.save(tmp_path / "a", with_keys)
    loaded = load_index(tmp_path / "a", keys=None if with_keys else scene.keys[:, :FIRST])
    for each in (index, loaded):
        each.append(scene.keys[:, FIRST:])
    for a, b in zip(index.search(scene.later, 50), loaded.search(scene.later, 50), strict=True):
        np.testing.assert_array_equal(a, b)
    if with_keys:
        saved = storage.read(tmp_path / "a").keys
        assert saved.dtype_name == "int8"
        np.testing.assert_array_equal(saved.array, scene.keys[:, :FIRST])
    else:
        with pytest.raises(ValueError, match="belongs to keys .* int8, got .* float32"):
            load_index(tmp_path / "a", keys=scene.wide[:, :FIRST])


@every_kind
def test_forked(kind, scene):
    index = build_index(kind, scene.keys[:, :FIRST], scene.queries, **options(kind))
    fork, snapshot, before = index.fork(scene.keys.copy()), index.snapshot(), index.search(scene.later, 20)
    index.append(np.flip(scene.keys[:, FIRST:], axis=1).copy())
    fork.append(scene.keys[:, FIRST:])
    assert all(np.array_equal(a, b) for a, b in zip(snapshot.search(scene.later, 20), before, strict=True))
    alone = build_index(kind, scene.keys[:, :FIRST], scene.queries, **options(kind))
    alone.append(scene.keys[:, FIRST:])
    for a, b in zip(fork.search(scene.later, 20), alone.search(scene.later, 20), strict=True):
        np.testing.assert_array_equal(a, b)


@every_kind
@pytest.mark.parametrize("n_keys", [1, 63, 500])
def test_every_number_there_is(kind, n_keys):
    rng = np.random.default_rng(0)
    keys = rng.integers(-128, 128, (2, n_keys, 16), dtype=np.int8)
    keys[:, 0], keys[:, -1] = -128, 127
    queries = rng.integers(-50, 51, (4, 3, 16)).astype(np.float32)
    hit = build_index(kind, torch.from_numpy(keys), queries).search(queries, n_keys)
    exact = np.einsum("htd,hsd->hts", queries.astype(np.int64), np.repeat(keys, 2, axis=0).astype(np.int64))
    np.testing.assert_array_equal(hit.scores, -np.sort(-exact, axis=2))
    np.testing.assert_array_equal(np.take_along_axis(exact, hit.ids, axis=2), hit.scores)


@pytest.mark.long
@pytest.mark.parametrize("score", SCORES)
def test_summaries_of_pages_are_those_of_bfloat16_keys(score, scene):
    """In int8 a mean would be rounded to a whole number, and the order of pages would be a matter of chance."""
    ours = build_index("page", scene.keys[:, :FIRST], score=score)
    theirs = build_index("page", as_bfloat16(scene.wide[:, :FIRST]), score=score)
    for index, keys in ((ours, scene.keys), (theirs, as_bfloat16(scene.wide))):
        index.append(keys[:, FIRST:])
    rows = [index._state.pages.rows[:, : 4000 // 16] for index in (ours, theirs)]
    np.testing.assert_array_equal(*rows)
    same("page", ours, theirs, scene.later)


def test_a_scale_goes_into_the_queries():
    """Per head and dimension, as whoever stores int8 keys chooses it."""
    scene = attention_like(n_keys=4000)
    unit = np.abs(scene.keys).max(axis=1, keepdims=True) / 127
    index = build_index("exact", np.rint(scene.keys / unit).astype(np.int8))
    hit = index.search(scene.later * np.repeat(unit, 2, axis=0), 100)
    true = build_index("exact", scene.keys).search(scene.later, 100)
    assert recall(hit.ids, true.ids) > 0.95
    np.testing.assert_allclose(hit.scores[..., 0], true.scores[..., 0], rtol=0.02)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.bool_])
def test_other_whole_numbers_are_refused(dtype, scene):
    with pytest.raises(ValueError, match=f"keys must be float32, float16, bfloat16, int8 .*got {np.dtype(dtype)}"):
        build_index("exact", scene.keys.astype(dtype))


@every_kind
def test_keys_of_another_dtype_cannot_follow(kind, scene):
    index = build_index(kind, scene.keys, scene.queries)
    with pytest.raises(ValueError, match="dtype of the index, int8 .*got float32"):
        index.append(scene.wide[:, :5])
    with pytest.raises(ValueError, match=r"keys must be \(2, 4000, 64\) int8.*got .* float32"):
        index.fork(scene.wide)
