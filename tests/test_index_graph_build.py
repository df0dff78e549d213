"""The steps of building a graph, each against its plain definition."""

import numpy as np
from test_index_vectors import attention_like

from retrieval_attn.index import graph_build as build
from retrieval_attn.index.protocol import Steps


def test_nearest_keys_are_the_nearest(monkeypatch):
    scene = attention_like(n_keys=2000, n_queries=700)
    queries, keys = scene.queries[0], scene.keys[0]
    ids = build.nearest_keys(keys, queries, 50, Steps())
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    expected = -np.sort(-scores, axis=1)[:, :50]
    np.testing.assert_allclose(np.take_along_axis(scores, ids, axis=1), expected, rtol=1e-5, atol=1e-4)


def test_points_are_as_far_apart_as_queries_tell_them_apart():
    scene = attention_like(n_keys=500, n_queries=300, dim=32)
    queries, keys = scene.queries[0], scene.keys[0]
    points = build.in_query_metric(keys, queries)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    difference = ((keys[:50, None] - keys[None, :50]) @ unit.T) ** 2
    apart = ((points[:50, None] - points[None, :50]) ** 2).sum(axis=-1)
    floor = ((keys[:50, None] - keys[None, :50]) ** 2).sum(axis=-1)
    largest = np.linalg.eigvalsh(unit.T @ unit / len(unit)).max()
    assert (apart >= difference.mean(axis=-1) * 0.999 - 1e-4).all()
    assert (apart <= difference.mean(axis=-1) + 0.0101 * largest * floor + 1e-4).all()


def test_cluster_neighbours_are_mostly_the_nearest():
    points = attention_like(n_keys=3000).keys[0]
    found = build.cluster_neighbours(points, 8, np.random.default_rng(0))
    squares = ((points[:200, None] - points[None]) ** 2).sum(axis=-1)
    squares[np.arange(200), np.arange(200)] = np.inf
    nearest = np.argsort(squares, axis=1)[:, :4]
    assert np.mean([np.isin(n, f).mean() for n, f in zip(nearest, found, strict=False)]) > 0.6
    assert not (found == np.arange(3000)[:, None]).any()


def test_pruning_keeps_the_nearest_and_drops_what_it_hides():
    """On a line: from 0, the link to 1 leads to 2 and 3; -1 stands alone. Free slots are then filled by nearness."""
    points = np.array([[0.0], [1.0], [2.0], [3.0], [-1.5]], np.float32)
    out = np.full(2, -1, np.int32)
    assert build.prune(points, 0, np.array([3, 2, 1, 4, 0, 1], np.int32), 1.0, out) == 2
    assert out.tolist() == [1, 4]
    out = np.full(4, -1, np.int32)
    build.prune(points, 0, np.array([3, 2, 1, 4], np.int32), 1.0, out)
    assert out.tolist() == [1, 4, 2, 3]


def test_every_list_leads_to_each_of_its_keys():
    rng = np.random.default_rng(0)
    lists = np.stack([rng.choice(300, 20, replace=False) for _ in range(40)]).astype(np.int32)
    links = np.full((300, 24), -1, np.int32)
    links[:, 0] = (np.arange(300) + 1) % 300
    build.connect_lists(links, lists)
    linked = [np.isin(row, links[row]).all() for row in lists]
    assert np.mean(linked) > 0.95
    assert (links[:, -1] == -1).all()


def test_repair_reaches_every_key_even_when_no_other_slot_is_free():
    """Two cliques without a link between them, every list full but for its last slot."""
    links = np.full((40, 20), -1, np.int32)
    for start in (0, 20):
        for key in range(start, start + 20):
            links[key, :19] = [other for other in range(start, start + 20) if other != key]
    assert build.repair(links, np.array([3], np.int32)) == 1
    alone = np.full((500, 4), -1, np.int32)
    assert build.repair(alone, np.array([499], np.int32)) == 499
    reached = np.zeros(500, bool)
    reached[499] = True
    build.reach(alone, 499, reached, np.empty(500, np.int32))
    assert reached.all()
