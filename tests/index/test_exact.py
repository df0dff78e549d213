"""The exact index against NumPy."""

import numpy as np
import pytest
import torch
from index_vectors import STORED, attention_like, every_stored

from retrieval_attn.arrays import as_float32
from retrieval_attn.index import build_index
from retrieval_attn.index.exact import scan
from retrieval_attn.index.keys import Keys


def by_definition(keys, q):
    """Scores (H, T, S) in float64."""
    shared = np.repeat(keys.astype(np.float64), len(q) // len(keys), axis=0)
    return np.einsum("htd,hsd->hts", q.astype(np.float64), shared)


def tolerance(keys, q):
    """Twice the largest error float32 NumPy makes on the same sums, and at least float32's own step."""
    exact = by_definition(keys, q)
    shared = np.repeat(keys, len(q) // len(keys), axis=0)
    error = np.abs(np.einsum("htd,hsd->hts", q, shared) - exact).max()
    return 2 * max(error, np.finfo(np.float32).eps * np.abs(exact).max())


@every_stored
@pytest.mark.parametrize("n_keys", [1, 63, 1000])
@pytest.mark.parametrize(("group", "n_times"), [(1, 1), (4, 1), (1, 5), (4, 5), (3, 1)])
def test_scores_and_ids_follow_the_definition(dtype, n_keys, group, n_times):
    scene = attention_like(2 * group, 2, n_keys, 8, n_times, dim=32)
    keys = STORED[dtype](scene.keys)
    hit = build_index("exact", keys).search(scene.later, k=min(100, n_keys))
    read = as_float32(keys)
    truth = by_definition(read, scene.later)
    best = -np.sort(-truth, axis=-1)[..., : hit.ids.shape[-1]]
    close = tolerance(read, scene.later)
    assert np.abs(hit.scores - best).max() <= close
    # Equal scores may change places, so an id is right if its own score is.
    assert np.abs(np.take_along_axis(truth, hit.ids, axis=-1) - hit.scores).max() <= close
    assert (np.diff(hit.scores, axis=-1) <= 0).all()
    assert all(len(set(row)) == len(row) for row in hit.ids.reshape(-1, hit.ids.shape[-1]))
    assert (hit.visited == n_keys).all()


def test_shapes_with_and_without_time():
    scene = attention_like()
    index = build_index("exact", scene.keys)
    one, many = index.search(scene.later[:, 0], k=7), index.search(scene.later[:, :3], k=7)
    assert (one.ids.shape, one.scores.shape, one.visited.shape) == ((4, 7), (4, 7), (4,))
    assert (many.ids.shape, many.scores.shape, many.visited.shape) == ((4, 3, 7), (4, 3, 7), (4, 3))
    assert (one.ids.dtype, one.scores.dtype, one.visited.dtype) == (np.int32, np.float32, np.int64)
    np.testing.assert_array_equal(one.ids, many.ids[:, 0])


def test_short_rows_are_padded():
    scene = attention_like(n_keys=5)
    hit = build_index("exact", scene.keys).search(scene.later[:, 0], k=8)
    assert (np.sort(hit.ids[:, :5], axis=1) == np.arange(5)).all()
    assert (hit.ids[:, 5:] == -1).all()
    assert np.isneginf(hit.scores[:, 5:]).all()


def test_ties_go_to_the_smaller_id_whatever_the_number_of_chunks():
    keys = np.ones((1, 9000, 16), np.float32)
    hit = build_index("exact", keys).search(np.ones((4, 16), np.float32), k=50)
    np.testing.assert_array_equal(hit.ids, np.tile(np.arange(50), (4, 1)))


def test_a_view_of_a_larger_buffer_is_read_in_place():
    scene = attention_like(n_keys=1000)
    buffer = np.full((2, 1500, 64), np.nan, np.float32)
    buffer[:, 128:1128] = scene.keys
    view = buffer[:, 128:1128]
    index = build_index("exact", view)
    expected = build_index("exact", scene.keys).search(scene.later, k=20)
    np.testing.assert_array_equal(index.search(scene.later, k=20).ids, expected.ids)
    view[0, 17] = 100 * scene.later[0, 0]
    assert index.search(scene.later[:, 0], k=1).ids[0, 0] == 17


def test_keys_stored_token_by_token_need_no_copy():
    scene = attention_like(n_keys=700)
    by_token = np.ascontiguousarray(scene.keys.transpose(1, 0, 2))
    hit = build_index("exact", by_token.transpose(1, 0, 2)).search(scene.later, k=20)
    np.testing.assert_array_equal(hit.ids, build_index("exact", scene.keys).search(scene.later, k=20).ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_are_read_as_they_are(dtype):
    scene = attention_like(n_keys=500)
    keys, q = torch.from_numpy(scene.keys).to(dtype), torch.from_numpy(scene.later).to(dtype)
    hit = build_index("exact", keys).search(q, k=10)
    expected = build_index("exact", keys.float().numpy()).search(q.float().numpy(), k=10)
    np.testing.assert_array_equal(hit.ids, expected.ids)


def test_a_part_of_the_keys_can_be_scanned():
    scene = attention_like(n_keys=3000)
    ids, _ = scan(Keys(scene.keys), scene.later.reshape(2, -1, 64), 10, 2500, 2600)
    truth = by_definition(scene.keys, scene.later)[..., 2500:2600].reshape(2, -1, 100)
    assert (np.sort(ids, -1) == np.sort(np.argsort(-truth, -1)[..., :10] + 2500, -1)).mean() > 0.99


def test_appended_keys_are_found():
    scene = attention_like(n_keys=1000)
    index = build_index("exact", scene.keys[:, :600].copy())
    for at in range(600, 1000, 100):
        index.append(scene.keys[:, at : at + 100])
    assert index.n_keys == 1000
    np.testing.assert_array_equal(
        index.search(scene.later, k=30).ids, build_index("exact", scene.keys).search(scene.later, k=30).ids
    )
