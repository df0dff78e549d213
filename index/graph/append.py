"""Placing and linking new keys in a graph that is already being searched, and forgetting the newest.

New keys get cells of their own. Links to them are written in place while searches read them: every entry is always a
valid id or -1, and searches skip ids that are newer than they are. So do forks, which share the links until they change
them: to a fork, an id that its origin has added since may be another key.
"""

import numba
import numpy as np

from retrieval_attn.arrays import Array, as_float32
from retrieval_attn.compiled import jit
from retrieval_attn.index.graph.cells import Cells, extended, grow_cells, head_of
from retrieval_attn.index.graph.links import link_cells
from retrieval_attn.index.graph.metric import Metric
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.protocol import Steps


def add_cells(cells: Cells, keys: Keys, metrics: list[Metric], first_key: int, links: Array, leaf: int) -> Cells:
    """The trees with the keys of all heads from id first_key on, which are linked to all keys, in place."""
    new = []
    for head, metric in enumerate(metrics):
        rows = lifted_rows(keys, head, np.arange(first_key, keys.shape[1]))
        new.append(grow_cells(rows, metric.points(rows), first_key, leaf, [first_key, head], Steps()))
    whole = extended(cells, new)
    for head, metric in enumerate(metrics):
        tree = head_of(whole, head)
        points_of = lambda ids, head=head, metric=metric: metric.points(lifted_rows(keys, head, ids))  # noqa: E731
        first_cell = len(tree.centroids) - len(new[head].centroids)
        link_cells(tree, first_cell, metric, points_of, first_key, links[head], Steps())
    return whole


def lifted_rows(keys: Keys, head: int, ids: Array) -> Array:
    """Some rows of `keys.lifted(head)`."""
    rows = as_float32(keys.array[head, ids])
    return rows if keys.lift is None else np.concatenate([rows, keys.bonus[head, ids, None]], axis=1)


def with_room(links: Array, owner: bool, n_linked: int, n_keys: int) -> Array:
    """The links between the keys 0..n_linked, with room for n_keys: `links` itself, or a copy with an eighth to spare.

    owner: whether `links` may be written to.
    """
    if owner and links.shape[1] >= n_keys:
        return links
    return links_below(links, n_linked, n_keys + n_keys // 8)


@jit(parallel=True)
def links_below(links: Array, n_keys: int, capacity: int) -> Array:
    """A copy of the links between the keys 0..n_keys, with room for `capacity` keys."""
    kept = np.full((len(links), capacity, links.shape[2]), np.int32(-1))
    for head in numba.prange(len(links)):
        for key in range(n_keys):
            n = 0
            for other in links[head, key]:
                if 0 <= other < n_keys:
                    kept[head, key, n] = other
                    n += 1
    return kept
