"""A tree over the keys of each head: cells of a few hundred keys, and in each cell leaves of a few.

Keys share a leaf when the sampled queries score them alike. A query therefore learns from the mean of a leaf about what
its keys will score, without reading them. Means are kept in the keys' own space: those of cells as they are, those of
leaves as differences from their cells', in 8 bits.
"""

from typing import NamedTuple

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index.exact import scan_chunk
from retrieval_attn.index.keys import HeadKeys
from retrieval_attn.index.loops.dots import add_run, dot
from retrieval_attn.index.protocol import Steps

CELL = 256

# More clusters than this are not sought at once but within clusters: that takes time in proportion to the keys.
MAX_CLUSTERS = 512

# Equal keys cannot be told apart by clustering: what exceeds these is cut into parts of nearly one size.
MAX_CELL = 1024
MAX_LEAF = 16


class Cells(NamedTuple):
    """The trees of all heads of a layer, one after the other.

    first_cells: (G + 1,) int64; head g has the cells first_cells[g] to first_cells[g + 1].
    centroids: (C, E) float32, mean of a cell's keys; E is D, or D + 1 with the bonus of a lifted index at the end.
    spreads: (C,) float32, standard deviation of the scores that a sampled query of length 1 gives to a cell's keys.
    first_leaves: (C + 1,) int64; likewise for the leaves of a cell.
    codes: (L, E) int8, and units: (L,) float32: mean of a leaf's keys less its cell's centroid, over the unit.
    leaf_spreads: (L,) float32.
    first_members: (L + 1,) int64; members: (n,) int32, key ids.
    """

    first_cells: Array
    centroids: Array
    spreads: Array
    first_leaves: Array
    codes: Array
    units: Array
    leaf_spreads: Array
    first_members: Array
    members: Array


def grow_cells(keys: Array, points: Array, first_key: int, leaf_size: int, seed: list[int], steps: Steps) -> Cells:
    """The tree of one head.

    keys: (n, E) float32, with ids from first_key on. points: (n, E) float32, the same keys in the queries' metric.
    """
    n_cells = max(1, len(points) // CELL)
    centroids = k_means(points, min(n_cells, MAX_CLUSTERS), np.random.default_rng(seed), steps.part(0.0, 0.4))
    owners = nearest(points, centroids, steps.part(0.4, 0.2))
    order = np.argsort(owners, kind="stable")
    cells = bounds_of(owners[order])
    if n_cells > MAX_CLUSTERS:
        order, cells = divided(points, order, cells, CELL, steps.part(0.6, 0.1))
    cells = cut(cells, MAX_CELL)
    order, leaves = divided(points, order, cells, leaf_size, steps.part(0.7, 0.3))
    leaves = cut(leaves, MAX_LEAF)
    first_leaves = np.searchsorted(leaves, cells)
    keys, points = keys[order], points[order]
    means = group_means(keys, cells)
    difference = group_means(keys, leaves) - np.repeat(means, np.diff(first_leaves), axis=0)
    units = np.maximum(np.abs(difference).max(axis=1), np.finfo(np.float32).tiny) / 127
    codes = np.rint(difference / units[:, None]).astype(np.int8)
    return Cells(
        first_cells=np.array([0, len(means)]),
        centroids=means,
        spreads=group_spreads(points, cells),
        first_leaves=first_leaves,
        codes=codes,
        units=units.astype(np.float32),
        leaf_spreads=group_spreads(points, leaves),
        first_members=leaves,
        members=(order + first_key).astype(np.int32),
    )


def joined(parts: list[Cells]) -> Cells:
    """One tree per part, as the trees of as many heads."""
    return stacked(parts, np.cumsum([0, *(len(part.centroids) for part in parts)]))


def stacked(parts: list[Cells], first_cells: Array) -> Cells:
    """All cells of all parts in this order; first_cells says which head has which."""

    def after(name: str) -> Array:
        firsts = [getattr(part, name) for part in parts]
        offsets = np.cumsum([0, *(first[-1] for first in firsts)])
        return np.concatenate([*(f[:-1] + o for f, o in zip(firsts, offsets, strict=False)), offsets[-1:]])

    def together(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    names = ("centroids", "spreads", "codes", "units", "leaf_spreads", "members")
    return Cells(
        first_cells=np.asarray(first_cells, np.int64),
        first_leaves=after("first_leaves"),
        first_members=after("first_members"),
        **{name: together(name) for name in names},
    )


def part_of(cells: Cells, first: int, last: int) -> Cells:
    """The cells first to last, as the tree of one head."""
    leaves = slice(cells.first_leaves[first], cells.first_leaves[last])
    members = slice(cells.first_members[leaves.start], cells.first_members[leaves.stop])
    return Cells(
        first_cells=np.array([0, last - first]),
        centroids=cells.centroids[first:last],
        spreads=cells.spreads[first:last],
        first_leaves=cells.first_leaves[first : last + 1] - leaves.start,
        codes=cells.codes[leaves],
        units=cells.units[leaves],
        leaf_spreads=cells.leaf_spreads[leaves],
        first_members=cells.first_members[leaves.start : leaves.stop + 1] - members.start,
        members=cells.members[members],
    )


def head_of(cells: Cells, head: int) -> Cells:
    """The tree of one head."""
    return part_of(cells, cells.first_cells[head], cells.first_cells[head + 1])


def extended(cells: Cells, new: list[Cells]) -> Cells:
    """The trees with one more part for every head."""
    parts = [part for head, extra in enumerate(new) for part in (head_of(cells, head), extra)]
    counts = [len(head_of(cells, head).centroids) + len(extra.centroids) for head, extra in enumerate(new)]
    return stacked(parts, np.cumsum([0, *counts]))


def without(cells: Cells, n_keys: int) -> Cells:
    """The trees without the keys from id n_keys on, and without what then is empty. Means stay as they were."""
    kept = cells.members < n_keys
    n_before = np.concatenate([[0], np.cumsum(kept)])
    first_members = n_before[cells.first_members]
    leaves = np.diff(first_members) > 0
    n_leaves = np.concatenate([[0], np.cumsum(leaves)])
    first_leaves = n_leaves[cells.first_leaves]
    filled = np.diff(first_leaves) > 0
    n_cells = np.concatenate([[0], np.cumsum(filled)])
    return Cells(
        first_cells=n_cells[cells.first_cells],
        centroids=cells.centroids[filled],
        spreads=cells.spreads[filled],
        first_leaves=np.append(first_leaves[:-1][filled], n_leaves[-1]),
        codes=cells.codes[leaves],
        units=cells.units[leaves],
        leaf_spreads=cells.leaf_spreads[leaves],
        first_members=np.append(first_members[:-1][leaves], n_before[-1]),
        members=cells.members[kept],
    )


def k_means(points: Array, n: int, rng: np.random.Generator, steps: Steps, iterations: int = 4) -> Array:
    """Centroids (n, E) of a sample of the points."""
    sample = points[rng.choice(len(points), min(len(points), 32 * n), replace=False)]
    centroids = sample[:n].copy()
    for i in range(iterations):
        owners = nearest(sample, centroids, steps.part(i / iterations, 1 / iterations))
        order = np.argsort(owners, kind="stable")
        bounds = bounds_of(owners[order])
        centroids[owners[order][bounds[:-1]]] = group_means(sample[order], bounds)
    return centroids


def nearest(points: Array, centroids: Array, steps: Steps) -> Array:
    """The nearest centroid of each point, (n,) int64; of equally near ones, the first."""
    half = 0.5 * np.einsum("nd,nd->n", centroids, centroids)
    owners = np.empty(len(points), np.int64)
    rows = max(256, 2**22 // len(centroids))
    for first in range(0, len(points), rows):
        steps.reached(first / len(points))
        take_best(points[first : first + rows] @ centroids.T, half, owners[first : first + rows])
    return owners


@jit(parallel=True)
def take_best(affinity: Array, half: Array, out: Array) -> None:
    for i in numba.prange(len(affinity)):
        best, at = np.float32(-np.inf), 0
        for c in range(len(half)):
            score = affinity[i, c] - half[c]
            if score > best:
                best, at = score, c
        out[i] = at


def divided(points: Array, order: Array, bounds: Array, size: int, steps: Steps) -> tuple[Array, Array]:
    """Divide each group order[bounds[i] : bounds[i + 1]] into clusters of `size` points in the mean.

    Returns the new order, which only changes within groups, and the bounds of the clusters.
    """
    labels = np.empty(len(order), np.int64)
    n_groups = len(bounds) - 1
    step = max(1, 2**14 * n_groups // len(order))
    for first in range(0, n_groups, step):
        steps.reached(first / n_groups)
        some = bounds[first : first + step + 1]
        label(points[order[some[0] : some[-1]]], some - some[0], size, labels[some[0] : some[-1]])
        # A label within a group is less than its number of points.
        labels[some[0] : some[-1]] += np.repeat(some[:-1], np.diff(some))
    steps.reached(1.0)
    by_label = np.argsort(labels, kind="stable")
    return order[by_label], bounds_of(labels[by_label])


@jit(parallel=True)
def label(points: Array, bounds: Array, size: int, labels: Array) -> None:
    for group in numba.prange(len(bounds) - 1):
        first, last = bounds[group], bounds[group + 1]
        cluster(points[first:last], max(1, (last - first) // size), labels[first:last])


@jit()
def cluster(points: Array, n: int, labels: Array) -> None:
    """Labels below n by k-means of few points, begun at evenly spaced ones."""
    n_points, dim = points.shape
    centroids = np.empty((n, dim), np.float32)
    for c in range(n):
        centroids[c] = points[c * n_points // n]
    minus_half = np.empty(n, np.float32)
    counts = np.empty(n, np.int64)
    ids = np.empty((n_points, 1), np.int32)
    scores = np.empty((n_points, 1), np.float32)
    for iteration in range(6):
        for c in range(n):
            minus_half[c] = -0.5 * dot(centroids[c], 0, centroids[c])
        scan_chunk(HeadKeys(centroids.reshape(-1), 0, dim, minus_half), points, 0, n, ids, scores)
        if iteration == 5:
            break
        counts[:] = 0
        for i in range(n_points):
            counts[ids[i, 0]] += 1
        for c in range(n):
            if counts[c]:
                centroids[c] = 0
        for i in range(n_points):
            add_run(centroids[ids[i, 0]], points[i], 0)
        for c in range(n):
            for d in range(dim if counts[c] else 0):
                centroids[c, d] /= counts[c]
    for i in range(n_points):
        labels[i] = ids[i, 0]


def bounds_of(owners: Array) -> Array:
    """Where runs of equal owners begin in a sorted array, and its length."""
    return np.concatenate([[0], np.flatnonzero(np.diff(owners)) + 1, [len(owners)]])


def cut(bounds: Array, most: int) -> Array:
    """The bounds of the same groups, with those of more than `most` members cut into parts of nearly one size."""
    sizes = np.diff(bounds)
    n_parts = -(-sizes // most)
    part = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    starts = np.repeat(bounds[:-1], n_parts) + part * np.repeat(sizes, n_parts) // np.repeat(n_parts, n_parts)
    return np.append(starts, bounds[-1])


def group_means(x: Array, bounds: Array) -> Array:
    """Mean of rows bounds[i] to bounds[i + 1], float32; no group is empty."""
    return np.add.reduceat(x, bounds[:-1], axis=0) / np.diff(bounds)[:, None].astype(np.float32)


def group_spreads(points: Array, bounds: Array) -> Array:
    """Root of the mean squared distance of a group's rows from their mean, float32."""
    away = points - np.repeat(group_means(points, bounds), np.diff(bounds), axis=0)
    squares = np.einsum("nd,nd->n", away, away)
    return np.sqrt(np.add.reduceat(squares, bounds[:-1]) / np.diff(bounds)).astype(np.float32)
