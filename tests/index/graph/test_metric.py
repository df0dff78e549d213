"""Distances between keys, as queries see them."""

import numpy as np
from index_vectors import attention_like

from retrieval_attn.index.graph.metric import FLOOR, fit_metric


def test_points_are_as_far_apart_as_queries_tell_them_apart():
    scene = attention_like(n_keys=500, n_queries=300, dim=32)
    queries, keys = scene.queries[0], scene.keys[0]
    points = fit_metric(keys, queries).points(keys)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    difference = ((keys[:50, None] - keys[None, :50]) @ unit.T) ** 2
    apart = ((points[:50, None] - points[None, :50]) ** 2).sum(axis=-1)
    straight = ((keys[:50, None] - keys[None, :50]) ** 2).sum(axis=-1)
    largest = np.linalg.eigvalsh(unit.T @ unit / len(unit)).max()
    assert (apart >= difference.mean(axis=-1) * 0.999 - 1e-4).all()
    # Directions that no query uses still count a little.
    assert (apart <= difference.mean(axis=-1) + 1.01 * FLOOR * largest * straight + 1e-4).all()


def test_a_direction_no_query_asks_about_hardly_counts():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((400, 8), dtype=np.float32) * np.float32([100, 1, 1, 1, 1, 1, 1, 1])
    queries = rng.standard_normal((200, 8), dtype=np.float32) * np.float32([0, 1, 1, 1, 1, 1, 1, 1])
    points = fit_metric(keys, queries).points(keys)
    a, b = keys[0], keys[0] + np.float32([10, 0, 0, 0, 0, 0, 0, 0])
    c = keys[0] + np.float32([0, 3, 0, 0, 0, 0, 0, 0])
    metric = fit_metric(keys, queries)
    far = lambda x: np.linalg.norm(metric.points(x[None]) - metric.points(a[None]))  # noqa: E731
    assert far(b) < 0.5 * np.linalg.norm(b - a) / np.linalg.norm(c - a) * far(c)
    assert points.std(axis=0).max() < 0.25 * keys.std(axis=0).max()


def test_queries_of_zero_leave_a_metric():
    keys = np.arange(40, dtype=np.float32).reshape(10, 4)
    points = fit_metric(keys, np.zeros((3, 4), np.float32)).points(keys)
    assert np.isfinite(points).all()
