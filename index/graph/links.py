"""Links between keys that the same queries want.

Candidates of a key are looked for with blocked matrix products among the leaves nearest to its cell. Some of a key's
links lead to the candidates that it ranks highest; most are given to keys that rank it high and find few others to lead
to them. Without that, keys at the edge, which are the ones that queries want, would have no link to them.
"""

from collections.abc import Callable, Iterator

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index.graph.cells import Cells
from retrieval_attn.index.graph.metric import Metric
from retrieval_attn.index.graph.search import dot_row, pack, unpack_id
from retrieval_attn.index.loops.largest import choose
from retrieval_attn.index.protocol import Steps

N_CANDIDATES = 64

# Keys that the keys of one cell are compared with: those of the best leaves of so many cells.
N_COMPARED = 4096
N_NEAR = 128

# Candidates y of x are ranked by 2 <x, y> - SHYNESS |y|^2. With 1 that ranks by distance; less favours keys far out,
# which queries that want x want too more often than the distance tells.
SHYNESS = 0.75

# Free slots left to each key for later ones.
N_SPARE = 1


def link_cells(
    tree: Cells,
    first_cell: int,
    metric: Metric,
    points_of: Callable[[Array], Array],
    first_key: int,
    links: Array,
    steps: Steps,
) -> None:
    """Link the keys from id first_key on, which are those of the cells from first_cell on; in place.

    tree: of one head. points_of: points (n, E) of key ids (n,). links: (>= S, M) int32, rows from first_key on are -1.
    """
    candidates = np.full((len(tree.members) - first_key, N_CANDIDATES), -1, np.int32)
    bounds = tree.first_members[tree.first_leaves]
    n_cells = len(tree.centroids)
    for cell, pool in enumerate(pools(tree, first_cell, metric), first_cell):
        if cell % 8 == 0:
            steps.reached(0.9 * (cell - first_cell) / (n_cells - first_cell))
        own = tree.members[bounds[cell] : bounds[cell + 1]]
        points = points_of(pool)
        scores = points_of(own) @ (2 * points.T)
        bias = -SHYNESS * np.einsum("nd,nd->n", points, points)
        pick_candidates(scores, bias, own, pool, first_key, candidates)
    give_links(links, candidates, first_key, steps.part(0.9, 0.1))


def pools(tree: Cells, first_cell: int, metric: Metric) -> Iterator[Array]:
    """For each cell from first_cell on, the ids of the keys among which its keys find their candidates."""
    sizes = np.diff(tree.first_members)
    share = min(1.0, N_COMPARED / len(tree.members))
    cell_lengths = squared_lengths(metric.points(tree.centroids), tree.spreads)
    leaf_lengths = np.empty(len(sizes), np.float32)
    owners = np.repeat(np.arange(len(tree.centroids)), np.diff(tree.first_leaves))
    for first in range(0, len(sizes), 2**15):
        some = slice(first, first + 2**15)
        means = tree.centroids[owners[some]] + tree.codes[some] * tree.units[some, None]
        leaf_lengths[some] = squared_lengths(metric.points(means), tree.leaf_spreads[some])
    for cell in range(first_cell, len(tree.centroids)):
        # The product with this is that of the points, up to what is the same for all of them.
        direction = 2 * metric.axes @ metric.points(tree.centroids[cell : cell + 1])[0]
        ranks = tree.centroids @ direction - SHYNESS * cell_lengths
        ranks[cell] = np.inf
        near = np.argpartition(-ranks, min(N_NEAR, len(ranks)) - 1)[:N_NEAR]
        leaves = ranges(tree.first_leaves[near], tree.first_leaves[near + 1] - tree.first_leaves[near])
        ranks = rank_leaves(tree, leaves, owners[leaves], direction) - SHYNESS * leaf_lengths[leaves]
        n = min(len(leaves), max(1, round(share * len(sizes))))
        best = leaves[np.argpartition(-ranks, n - 1)[:n]]
        yield tree.members[ranges(tree.first_members[best], sizes[best])]


def squared_lengths(means: Array, spreads: Array) -> Array:
    """Mean squared length of points with this mean and this spread around it."""
    return np.einsum("nd,nd->n", means, means) + spreads**2


@jit()
def rank_leaves(tree: Cells, leaves: Array, owners: Array, direction: Array) -> Array:
    """Inner product of the leaves' means with the direction; owners: their cells."""
    out = np.empty(len(leaves), np.float32)
    for i in range(len(leaves)):
        above = tree.units[leaves[i]] * dot_row(tree.codes[leaves[i]], direction)
        out[i] = dot_row(tree.centroids[owners[i]], direction) + above
    return out


def ranges(starts: Array, sizes: Array) -> Array:
    """starts[0], starts[0] + 1, ... (sizes[0] numbers), then likewise for the others."""
    return np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)


@jit(parallel=True)
def pick_candidates(scores: Array, bias: Array, own: Array, pool: Array, first_key: int, out: Array) -> None:
    """out[key - first_key] = the best of the pool for each own key, best first, then by id. Changes `scores`."""
    n = min(out.shape[1], len(pool))
    for row in numba.prange(len(own)):
        values = scores[row]
        for j in range(len(pool)):
            values[j] = values[j] + bias[j] if pool[j] != own[row] else -np.inf
        best = np.empty(n, np.int64)
        choose(values, best)
        entries = np.empty(n, np.uint64)
        for j in range(n):
            entries[j] = pack(values[best[j]], pool[best[j]])
        entries.sort()
        at = own[row] - first_key
        n_found = 0
        for entry in entries:
            if unpack_id(entry) != own[row]:
                out[at, n_found] = unpack_id(entry)
                n_found += 1


def give_links(links: Array, candidates: Array, first_key: int, steps: Steps) -> None:
    """Write the rows of links from first_key on, and give some of these keys to older rows that have room.

    Keys ask candidate after candidate for a link to them, all in turn, best candidate first.
    """
    n_new, width = candidates.shape
    degree = links.shape[1]
    n_out = min(degree * 3 // 8, width)
    links[first_key : first_key + n_new, :n_out] = candidates[:, :n_out]
    n_left = np.full(n_new, degree - n_out - N_SPARE)
    for rank in range(width):
        steps.reached(rank / width)
        ask(links, candidates[:, rank].copy(), first_key, n_left)
    steps.reached(1.0)


@jit()
def ask(links: Array, hosts: Array, first_key: int, n_left: Array) -> None:
    """Each key that is to be given n_left links more gets one from its host, if that has room."""
    degree = links.shape[1]
    for i in range(len(hosts)):
        host = hosts[i]
        if host >= 0 and n_left[i]:
            n_kept = 0 if host < first_key else N_SPARE
            if links[host, degree - 1 - n_kept] < 0 and add_link(links[host], first_key + i):
                n_left[i] -= 1


@jit()
def add_link(row: Array, key: int) -> bool:
    """Put `key` in the first free slot, of which there is one; False if it stands there already."""
    for j in range(len(row)):
        if row[j] == key:
            return False
        if row[j] < 0:
            row[j] = key
            return True
    return False
