"""Inner products in each stored dtype against float64."""

import numpy as np
import pytest
from index_vectors import STORED

from retrieval_attn.arrays import as_float32, as_stored
from retrieval_attn.index.loops import dots


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("dim", [1, 7, 64, 129])
def test_all_ways_to_multiply_agree_with_the_definition(dtype, dim):
    rng = np.random.default_rng(dim)
    keys = STORED[dtype](rng.standard_normal((6, dim + 3), dtype=np.float32) * 4)
    flat, read = as_stored(keys).ravel(), as_float32(keys).astype(np.float64)[:, :dim]
    queries = rng.standard_normal((5, dim), dtype=np.float32)
    truth = queries.astype(np.float64) @ read.T
    # Any order of summation errs by at most this.
    close = dim * np.finfo(np.float32).eps * (np.abs(queries.astype(np.float64)) @ np.abs(read).T).max()
    tile, run = np.zeros((4, 10), np.float32), np.zeros(4, np.float32)
    dots.dots_4x4(flat, dim + 3, dim + 3, queries, 1, tile, 6)
    np.testing.assert_allclose(tile[:, 6:], truth[1:5, 1:5], rtol=0, atol=close)
    dots.dots_4x1(flat, dim + 3, dim + 3, queries[0], run)
    np.testing.assert_allclose(run, truth[0, 1:5], rtol=0, atol=close)
    assert abs(dots.dot(flat, 2 * (dim + 3), queries[3]) - truth[3, 2]) <= close
    apart = ((read[2] - queries[3]) ** 2).sum()
    assert abs(dots.squared_distance(flat, 2 * (dim + 3), queries[3]) - apart) <= dim * 2e-7 * max(apart, 1)
    point = np.empty(dim, np.float32)
    dots.read_key(flat, 4 * (dim + 3), point)
    np.testing.assert_array_equal(point, read[4])
