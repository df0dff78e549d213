"""Coordinates for codes: inner products survive, and what queries look at is kept."""

import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like

from retrieval_attn.index.keys import Keys
from retrieval_attn.index.scan.map import KEPT, fit


def coordinates(scene, found, head=0):
    return scene.keys[head] @ found.keys[head].T - found.offsets[head]


@pytest.mark.parametrize("asked", [True, False])
def test_all_coordinates_give_the_scores(asked):
    scene = attention_like(n_keys=700)
    found = fit(Keys(scene.keys), scene.queries if asked else None, 0, dims=64)
    for head in (0, 1):
        q = scene.later[2 * head + 1]
        scores = (q @ found.queries[head].T) @ coordinates(scene, found, head).T
        true = q @ (scene.keys[head] - scene.keys[head].mean(axis=0)).T
        np.testing.assert_allclose(scores, true, rtol=1e-3, atol=1e-3 * np.abs(true).max())


def test_dims_are_rounded_up_to_whole_groups_and_the_rest_is_zero():
    scene = attention_like(n_keys=300, dim=40)
    found = fit(Keys(scene.keys), scene.queries, 0, dims=13)
    assert found.keys.shape == found.queries.shape == (2, 16, 40)
    assert not found.keys[:, 13:].any()
    assert not found.queries[:, 13:].any()
    assert fit(Keys(scene.keys), scene.queries, 0, dims=1000).keys.shape[1] == 40


def test_few_directions_are_kept_where_keys_vary_in_few():
    scene = attention_like(n_keys=3000)
    kept = fit(Keys(scene.keys), None, 0, dims=None)
    n_kept = kept.keys.shape[1]
    spectrum = np.linalg.eigvalsh(np.cov(scene.keys[0].T))[::-1]
    assert n_kept < 64
    assert spectrum[:n_kept].sum() >= KEPT * spectrum.sum()


def test_directions_that_queries_ask_for_are_kept_before_others():
    """Keys vary most where no query looks: without the queries, what they look at would be left out."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 4000, 32), dtype=np.float32)
    keys[..., :24] *= 1.5
    queries = rng.standard_normal((2, 400, 32), dtype=np.float32)
    queries[..., :24] *= 0.05
    q = queries[0, :50]
    true = (q @ (keys[0] - keys[0].mean(axis=0)).T).ravel()
    agreement = []
    for asked in (queries, None):
        found = fit(Keys(keys), asked, 0, dims=16)
        estimate = (q @ found.queries[0].T) @ (keys[0] @ found.keys[0].T - found.offsets[0]).T
        agreement.append(np.corrcoef(estimate.ravel(), true)[0, 1])
    assert agreement[0] > 0.9 > 0.7 > agreement[1]


def test_coordinates_vary_alike():
    """So that one step size suits all: the largest is no more than a few times the others."""
    scene = attention_like(n_keys=3000)
    spread = coordinates(scene, fit(Keys(scene.keys), scene.queries, 0, dims=16)).std(axis=0)
    axes = np.linalg.eigvalsh(np.cov(scene.keys[0].T))[::-1][:16] ** 0.5
    assert spread.max() / spread.min() < 0.6 * axes.max() / axes.min()


def test_one_enormous_key_changes_little():
    scene = attention_like(n_keys=3000)
    dims = fit(Keys(scene.keys), scene.queries, 0, None).keys.shape[1]
    giant = scene.keys.copy()
    giant[:, 0] *= 1000
    assert abs(fit(Keys(giant), scene.queries, 0, None).keys.shape[1] - dims) <= 8


@pytest.mark.parametrize("keys", [np.zeros((1, 40, 8), np.float32), np.ones((1, 40, 8), np.float32)])
@pytest.mark.parametrize("queries", [None, np.zeros((1, 4, 8), np.float32), np.full((1, 4, 8), 1e38, np.float32)])
def test_degenerate_samples_give_finite_coordinates(keys, queries):
    for found in fit(Keys(keys), queries, 0, None):
        assert np.isfinite(found).all()


def test_the_seed_decides():
    scene = attention_like(n_keys=300)
    a, b, c = (fit(Keys(as_bfloat16(scene.keys)), scene.queries, seed, 16).keys for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
