"""The tree over the keys: every key in one leaf, means that are means, and shapes that survive equal keys."""

import numpy as np
import pytest
from index_vectors import attention_like

from retrieval_attn.index.graph import cells
from retrieval_attn.index.graph.metric import fit_metric
from retrieval_attn.index.protocol import Steps


def grown(keys, queries, first_key=0, leaf=4):
    metric = fit_metric(keys, queries)
    return cells.grow_cells(keys, metric.points(keys), first_key, leaf, [0], Steps()), metric


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=3000, n_queries=200)


def owners(tree):
    """Cell and leaf of each place in `members`."""
    leaf = np.repeat(np.arange(len(tree.codes)), np.diff(tree.first_members))
    cell = np.repeat(np.arange(len(tree.centroids)), np.diff(tree.first_leaves))
    return cell[leaf], leaf


def test_every_key_stands_in_one_leaf(scene):
    tree, _ = grown(scene.keys[0], scene.queries[0], first_key=70)
    assert sorted(tree.members) == list(range(70, 3070))
    assert tree.first_cells.tolist() == [0, len(tree.centroids)]
    assert np.diff(tree.first_leaves).min() >= 1
    assert np.diff(tree.first_members).min() >= 1
    assert np.diff(tree.first_members).max() <= cells.MAX_LEAF
    assert 2 < np.diff(tree.first_members).mean() < 6


def test_means_and_spreads_are_those_of_the_members(scene):
    keys = scene.keys[0]
    tree, metric = grown(keys, scene.queries[0])
    members, points = keys[tree.members], metric.points(keys)[tree.members]
    cell, leaf = owners(tree)
    for c in range(0, len(tree.centroids), 3):
        np.testing.assert_allclose(tree.centroids[c], members[cell == c].mean(axis=0), rtol=1e-4, atol=1e-4)
        away = points[cell == c] - points[cell == c].mean(axis=0)
        assert tree.spreads[c] == pytest.approx(np.sqrt((away**2).sum(axis=1).mean()), rel=1e-3)
    for x in range(0, len(tree.codes), 50):
        mean = tree.centroids[cell[leaf == x][0]] + tree.units[x] * tree.codes[x]
        # Rounding to 8 bits is off by at most half a unit.
        assert np.abs(mean - members[leaf == x].mean(axis=0)).max() <= 0.51 * tree.units[x] + 1e-5
        away = points[leaf == x] - points[leaf == x].mean(axis=0)
        assert tree.leaf_spreads[x] == pytest.approx(np.sqrt((away**2).sum(axis=1).mean()), rel=1e-3, abs=1e-4)


def test_keys_of_a_leaf_score_alike(scene):
    """The sampled queries tell keys of one leaf apart far less than keys of one cell, and those less than any two."""
    tree, metric = grown(scene.keys[0], scene.queries[0])
    points = metric.points(scene.keys[0])
    overall = np.sqrt(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert np.median(tree.leaf_spreads) < 0.8 * np.median(tree.spreads) < 0.8 * overall


@pytest.mark.parametrize("n", [1, 2, 255, 700, 5000])
def test_equal_keys_are_shared_out(n):
    keys = np.ones((n, 8), np.float32)
    tree, _ = grown(keys, np.ones((3, 8), np.float32))
    assert sorted(tree.members) == list(range(n))
    assert np.diff(tree.first_members).max() <= cells.MAX_LEAF
    assert np.diff(tree.first_members[tree.first_leaves]).max() <= cells.MAX_CELL
    np.testing.assert_array_equal(tree.centroids, 1)
    assert (tree.spreads == 0).all()


def test_trees_are_put_together_and_taken_apart(scene):
    a, _ = grown(scene.keys[0], scene.queries[0])
    b, _ = grown(scene.keys[1], scene.queries[2])
    both = cells.joined([a, b])
    more, _ = grown(scene.keys[0, :500], scene.queries[0], first_key=3000)
    for x, y in zip(cells.head_of(both, 1), b, strict=True):
        np.testing.assert_array_equal(x, y)
    longer = cells.extended(both, [more, more])
    for head, old in enumerate((a, b)):
        tree = cells.head_of(longer, head)
        assert sorted(tree.members) == list(range(3500))
        n = len(old.centroids)
        for x, y in zip(cells.part_of(longer, *(longer.first_cells[head] + [0, n])), old, strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(tree.codes[len(old.codes) :], more.codes)
    short = cells.without(longer, 2500)
    for head in (0, 1):
        assert sorted(cells.head_of(short, head).members) == list(range(2500))
    few = cells.without(longer, 5)
    assert np.diff(few.first_members).min() > 0
    assert np.diff(few.first_leaves).min() > 0
    assert len(few.centroids) == few.first_cells[2] <= 10
    assert len(few.codes) == few.first_leaves[-1] == len(few.first_members) - 1
    for head in (0, 1):
        tree = cells.head_of(few, head)
        assert sorted(tree.members) == list(range(5))
        cell, _ = owners(tree)
        for at, key in enumerate(tree.members):
            old = cells.head_of(longer, head)
            old_cell, _ = owners(old)
            np.testing.assert_array_equal(tree.centroids[cell[at]], old.centroids[old_cell[old.members == key][0]])


def test_groups_are_cut_evenly():
    assert cells.cut(np.array([0, 3, 13, 13 + 8]), 4).tolist() == [0, 3, 6, 9, 13, 17, 21]
    assert cells.bounds_of(np.array([2, 2, 5, 7, 7, 7])).tolist() == [0, 2, 3, 6]


def test_nearest_centroids_are_the_nearest(scene):
    points, centroids = scene.keys[0], scene.keys[0, ::400].copy()
    squares = ((points[:, None] - centroids[None]) ** 2).sum(axis=-1)
    assert (cells.nearest(points, centroids, Steps()) == squares.argmin(axis=1)).mean() > 0.999
