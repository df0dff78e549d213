"""Links against their plain definitions."""

import numpy as np
import pytest
from index_vectors import attention_like

from retrieval_attn.index.graph import links
from retrieval_attn.index.graph.cells import grow_cells
from retrieval_attn.index.graph.metric import fit_metric
from retrieval_attn.index.protocol import Steps


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=6000, n_queries=200)


def linked(keys, queries, degree=16):
    metric = fit_metric(keys, queries)
    points = metric.points(keys)
    tree = grow_cells(keys, points, 0, 4, [0], Steps())
    rows = np.full((len(keys), degree), -1, np.int32)
    links.link_cells(tree, 0, metric, points.__getitem__, 0, rows, Steps())
    return rows, points


def test_candidates_are_the_best_of_the_pool():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 300), dtype=np.float32)
    bias = rng.standard_normal(300, dtype=np.float32)
    scores[:, 20], bias[20] = scores[:, 21], bias[21]
    pool = rng.permutation(1000)[:300].astype(np.int32)
    own = pool[[3, 77, 150, 20, 299]]
    out = np.full((1000, 40), -1, np.int32)
    whole = scores + bias
    links.pick_candidates(scores.copy(), bias, own, pool, 0, out)
    for row, key in enumerate(own):
        order = [i for i in np.lexsort((pool, -whole[row])) if pool[i] != key]
        assert out[key].tolist() == pool[order[:40]].tolist()
    assert (np.delete(out, own, axis=0) == -1).all()


def test_a_small_pool_gives_all_it_has():
    pool = np.arange(5, dtype=np.int32)
    out = np.full((5, 40), -1, np.int32)
    links.pick_candidates(np.zeros((5, 5), np.float32), np.zeros(5, np.float32), pool, pool, 0, out)
    for key in range(5):
        assert out[key, :4].tolist() == [x for x in range(5) if x != key]
        assert (out[key, 4:] == -1).all()


def test_most_candidates_are_the_best_of_all_keys(scene):
    """Looked for among 4096 of the 6000 keys; ranked over all of them in the plain way."""
    keys, queries = scene.keys[0], scene.queries[0]
    rows, points = linked(keys, queries)
    lengths = (points**2).sum(axis=1)
    rank = 2 * points[:200] @ points.T - links.SHYNESS * lengths
    rank[np.arange(200), np.arange(200)] = -np.inf
    best = np.argsort(-rank, axis=1)[:, :6]
    assert np.mean([np.isin(b, r).mean() for b, r in zip(best, rows, strict=False)]) > 0.95


def test_every_key_is_led_to(scene):
    """Keys far out have few near neighbours that would choose them; they are given links all the same."""
    rows, _ = linked(scene.keys[0], scene.queries[0])
    leading = np.bincount(rows[rows >= 0], minlength=len(rows))
    assert (leading >= 3).mean() > 0.99
    full = (rows >= 0).sum(axis=1)
    assert full.max() <= 16 - links.N_SPARE
    assert full.mean() > 12
    assert (np.diff((rows < 0).astype(int), axis=1) >= 0).all(), "free slots stand at the end"
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)
    assert (rows != np.arange(len(rows))[:, None]).all()


def test_keys_take_turns_in_asking_for_links():
    """Keys 1 to 3 all want to be led to by key 0, which has room for two."""
    candidates = np.array([[4, 5], [0, 4], [0, 5], [0, 6], [-1, -1], [-1, -1], [-1, -1]], np.int32)
    rows = np.full((7, 4), -1, np.int32)
    links.give_links(rows, candidates, 0, Steps())
    assert rows[0].tolist() == [4, 1, 2, -1]
    # Key 3 found no room there and goes on to its next candidate.
    assert 3 in rows[6]
    assert rows[3].tolist()[0] == 0


def test_new_keys_may_use_the_slot_that_older_ones_kept_free():
    rows = np.full((3, 4), -1, np.int32)
    rows[0] = [1, 2, 1, -1]
    links.give_links(rows, np.array([[0, 1]], np.int32), 2, Steps())
    assert rows[0].tolist() == [1, 2, 1, -1]  # it leads to key 2 already
    rows[0] = [1, 1, 1, -1]
    rows[2] = -1
    links.give_links(rows, np.array([[0, 1]], np.int32), 2, Steps())
    assert rows[0].tolist() == [1, 1, 1, 2]
    assert 2 in rows[1]


def test_ranges():
    assert links.ranges(np.array([5, 0, 9]), np.array([2, 3, 0])).tolist() == [5, 6, 0, 1, 2]
