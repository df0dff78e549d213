"""4-bit codes: near their coordinates, the same one by one as all at once, and unchanged under older views."""

import numpy as np
import pytest
from index_vectors import STORED, as_bfloat16, attention_like, every_stored
from scan_codes import decoded

from retrieval_attn.index.keys import Keys
from retrieval_attn.index.scan.codes import CHUNK, Codes, extend
from retrieval_attn.index.scan.map import fit


def encoded(keys, coordinates, codes=None):
    codes = (codes or Codes.empty(keys.shape[0], coordinates.keys.shape[1], keys.shape[1])).roomy(keys.shape[1])
    for head in range(keys.shape[0]):
        extend(codes, keys, coordinates, head)
    return codes._replace(n_keys=keys.shape[1])


@every_stored
@pytest.mark.parametrize("n_keys", [1, 3, 63, 1000, CHUNK + 5])
def test_codes_stand_for_the_coordinates(dtype, n_keys):
    scene = attention_like(n_keys=n_keys, n_queries=16, dim=40)
    keys = Keys(STORED[dtype](scene.keys))
    coordinates = fit(keys, scene.queries, 0, 20)
    codes = encoded(keys, coordinates)
    for head in (0, 1):
        true = keys.float32(head) @ coordinates.keys[head].T - coordinates.offsets[head]
        step = np.abs(true).max(axis=1, keepdims=True) / 7.5
        # Half a step, and the rounding of the factor to eight bits at the ends.
        assert (np.abs(decoded(codes, head) - true) <= 0.5 * step + 7.5 * step / 256 + 1e-5).all()


def test_errors_cancel():
    """Over many keys an estimate is right in the mean: its error is no more than chance makes of single errors."""
    scene = attention_like(n_keys=4000)
    keys = Keys(scene.keys)
    coordinates = fit(keys, scene.queries, 0, 64)
    error = decoded(encoded(keys, coordinates), 0) - (keys.float32(0) @ coordinates.keys[0].T - coordinates.offsets[0])
    off = (error @ coordinates.queries[0] @ scene.later[0].T).T
    assert (np.abs(off.mean(axis=1)) < 5 * off.std(axis=1) / np.sqrt(4000)).all()


def test_one_by_one_gives_the_same_codes():
    scene = attention_like(n_keys=CHUNK + 60, n_queries=16)
    keys = Keys(as_bfloat16(scene.keys))
    coordinates = fit(keys, scene.queries, 0, 24)
    at_once = encoded(keys, coordinates)
    grown = encoded(keys.first(CHUNK + 1), coordinates)
    for n in (CHUNK + 2, CHUNK + 3, CHUNK + 20, CHUNK + 60):
        grown = encoded(keys.first(n), coordinates, grown)
    for a, b in zip(at_once.trimmed(), grown.trimmed(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_growing_leaves_older_views_alone():
    scene = attention_like(n_keys=400, n_queries=16)
    keys, others = Keys(scene.keys), Keys(scene.keys[:, ::-1].copy())
    coordinates = fit(keys, scene.queries, 0, 24)
    whole = encoded(keys, coordinates)
    before = decoded(whole, 0).copy()
    replaced = encoded(others.first(350), coordinates, whole.first(300))
    np.testing.assert_array_equal(decoded(whole, 0), before)
    np.testing.assert_array_equal(decoded(replaced, 0)[:300], before[:300])
    assert not np.allclose(decoded(replaced, 0)[300:], before[300:350])
    # With room left and nobody else behind, keys are added in place.
    assert encoded(others.first(351), coordinates, replaced).blocks is replaced.blocks


def test_a_key_that_is_the_mean_has_a_factor_of_zero():
    keys = Keys(np.zeros((1, 40, 16), np.float32))
    codes = encoded(keys, fit(keys, None, 0, None))
    assert not codes.factors.any()
