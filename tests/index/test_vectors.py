"""Attention-like vectors for the index tests, and proof that they have what makes attention hard.

Gaussian queries would hide every retrieval bug: here keys share a mean, fill few directions, turn with their position,
contain heavy hitters, and queries come from elsewhere.
"""

import numpy as np
from index_vectors import attention_like


def test_keys_fill_few_directions_around_a_mean():
    keys = attention_like().keys[0]
    centred = keys - keys.mean(axis=0)
    energy = np.linalg.svd(centred, compute_uv=False) ** 2
    n_directions = np.searchsorted(np.cumsum(energy) / energy.sum(), 0.9) + 1
    assert np.linalg.norm(keys.mean(axis=0)) > 0.3 * np.linalg.norm(centred, axis=1).mean()
    assert n_directions < keys.shape[1] * 0.5


def test_queries_come_from_elsewhere():
    scene = attention_like()
    keys = scene.keys[0]
    mean = keys.mean(axis=0)
    precision = np.linalg.inv(np.cov(keys.T))
    mahalanobis = lambda x: np.sqrt(np.einsum("nd,de,ne->n", x - mean, precision, x - mean))  # noqa: E731
    assert np.median(mahalanobis(scene.later[0])) > 2 * np.median(mahalanobis(keys))


def test_some_keys_are_found_by_many_queries():
    scene = attention_like()
    scores = scene.later[0] @ scene.keys[0].T
    top = np.argsort(-scores, axis=1)[:, :100]
    often = np.bincount(top.ravel(), minlength=scene.keys.shape[1])
    assert often.max() > 0.5 * len(top)
    assert (often > 0).mean() < 0.5
