"""Search of the trees and links of all heads of a layer in one call."""

from typing import Any

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import as_float, jit, prefetch
from retrieval_attn.index.graph.cells import Cells
from retrieval_attn.index.keys import FlatKeys, HeadKeys, of_head
from retrieval_attn.index.loops.dots import shift_right
from retrieval_attn.index.loops.largest import choose

# A beam entry is one integer that sorts best score first, then smallest id: 32 bits of score, 31 of id, and the
# lowest bit set once the key's links were followed.
FOLLOWED = np.uint64(1)

# Keys read for each place in the beam before any link is followed, and keys whose leaves are looked at for that.
N_FIRST = 12
N_PROBED = 24

# A group is rated by the mean score of its keys, plus this many standard deviations.
OPTIMISM = 2.0

AHEAD = 8


@jit(parallel=True)
def search_graphs(
    keys: FlatKeys,
    cells: Cells,
    links: Array,
    n_linked: int,
    seeds: Array,
    queries: Array,
    effort: int,
    ids: Array,
    scores: Array,
    visited: Array,
) -> None:
    """Search for each query among the linked keys; the queries of all heads are shared among the cores.

    links: (G, capacity, M). seeds: (G, N, n) ids, those below 0 skipped. queries: (G, N, E).
    Writes ids, scores (G, N, k), best first, and visited (G, N).
    """
    n_heads, n_queries, _ = queries.shape
    for task in numba.prange(n_heads * n_queries):
        head, query = task // n_queries, task % n_queries
        own, begin, asked = of_head(keys, head), seeds[head, query], queries[head, query]
        found = ids[head, query], scores[head, query]
        visited[head, query] = search_one(
            own, cells, head, links[head], n_linked, begin, asked, effort, found[0], found[1]
        )


@jit()
def search_one(
    keys: HeadKeys,
    cells: Cells,
    head: int,
    links: Array,
    n_keys: int,
    seeds: Array,
    query: Array,
    effort: int,
    ids: Array,
    scores: Array,
) -> int:
    """Find the keys of largest score. Returns the number of keys scored.

    First `seeds` and the keys of the most promising leaves are read. The beam holds the best `effort` keys so far;
    the search ends when the links of all of them were followed.
    """
    # One bit per key: at 128K keys 16 KB, which stay in the first-level cache and cost nothing to clear.
    marks = np.zeros((n_keys + 63) >> 6, np.uint64)
    beam = np.empty(effort, np.uint64)
    leaves = best_leaves(cells, head, query, effort * N_FIRST)
    todo = np.empty(max(count_members(cells, leaves) + len(seeds), links.shape[1]), np.int64)
    n_todo = add_news(seeds, n_keys, marks, todo, 0)
    for leaf in leaves:
        members = cells.members[cells.first_members[leaf] : cells.first_members[leaf + 1]]
        n_todo = add_news(members, n_keys, marks, todo, n_todo)
    found = np.empty(len(todo), np.float32)
    read_keys(keys, todo[:n_todo], query, found)
    n_beam = fill(beam, todo[:n_todo], found[:n_todo])
    n_visited, at = n_todo, 0
    while at < n_beam:
        beam[at] |= FOLLOWED
        n_todo = add_news(links[unpack_id(beam[at])], n_keys, marks, todo, 0)
        n_visited += n_todo
        read_keys(keys, todo[:n_todo], query, found)
        for i in range(n_todo):
            entry = pack(found[i], todo[i])
            if n_beam < effort or entry < beam[n_beam - 1]:
                n_beam, place = insert(beam, n_beam, entry)
                at = min(at, place)
                prefetch(links.reshape(-1), todo[i] * links.shape[1], links.shape[1])
        while at < n_beam and beam[at] & FOLLOWED:
            at += 1
    n = min(n_beam, len(ids))
    for i in range(n):
        ids[i] = unpack_id(beam[i])
        scores[i] = unpack_score(beam[i])
    ids[n:] = -1
    scores[n:] = -np.inf
    return n_visited


@jit()
def read_keys(keys: HeadKeys, chosen: Array, query: Array, scores: Array) -> None:
    """scores[i] = score of key chosen[i]."""
    values, base, stride, bonus = keys
    dim = len(query) - (1 if len(bonus) else 0)
    for i in range(min(AHEAD, len(chosen))):
        prefetch(values, base + chosen[i] * stride, dim)
    for i in range(len(chosen)):
        if i + AHEAD < len(chosen):
            prefetch(values, base + chosen[i + AHEAD] * stride, dim)
        scores[i] = dot_key(values, base + chosen[i] * stride, query, dim)
        if len(bonus):
            scores[i] += bonus[chosen[i]]


@jit()
def fill(beam: Array, keys: Array, scores: Array) -> int:
    """Fill the empty beam with the best of the keys. Returns its size."""
    n = min(len(beam), len(keys))
    best = np.empty(n, np.int64)
    choose(scores, best)
    for i in range(n):
        beam[i] = pack(scores[best[i]], keys[best[i]])
    beam[:n].sort()
    return n


@jit()
def dot_key(values: Array, row: int, query: Array, dim: int) -> np.float32:
    key = values[row : row + dim]
    total = np.float32(0)
    for d in range(dim):
        total += as_float(key[d]) * query[d]
    return total


@jit()
def count_members(cells: Cells, leaves: Array) -> int:
    n = 0
    for leaf in leaves:
        n += cells.first_members[leaf + 1] - cells.first_members[leaf]
    return n


@jit()
def add_news(keys: Array, n_keys: int, marks: Array, out: Array, n: int) -> int:
    """Mark the keys, and write those not marked before from out[n] on. Returns the new n.

    An append that runs now may have linked keys that this search does not know: they are no news, nor is -1.
    """
    for key in keys:
        if 0 <= key < n_keys:
            word, bit = np.int64(key) >> 6, np.uint64(1) << np.uint64(key & 63)
            if marks[word] & bit == 0:
                marks[word] |= bit
                out[n] = key
                n += 1
    return n


@jit()
def best_leaves(cells: Cells, head: int, query: Array, n_keys: int) -> Array:
    """The leaves that promise most, about as many as hold n_keys keys."""
    first, last = cells.first_cells[head], cells.first_cells[head + 1]
    reach = np.float32(OPTIMISM * np.sqrt(np.sum(query * query)))
    means = np.empty(last - first, np.float32)
    for cell in range(first, last):
        means[cell - first] = dot_row(cells.centroids[cell], query)
    # Cells and leaves are counted as if each held the mean number of keys.
    first_leaf, last_leaf = cells.first_leaves[first], cells.first_leaves[last]
    n_members = cells.first_members[last_leaf] - cells.first_members[first_leaf]
    n_probed = 1 + N_PROBED * n_keys * (last - first) // n_members
    probed = np.empty(min(n_probed, last - first), np.int64)
    choose(means + reach * cells.spreads[first:last], probed)
    n = 0
    for cell in probed:
        n += cells.first_leaves[first + cell + 1] - cells.first_leaves[first + cell]
    leaves = np.empty(n, np.int64)
    hopes = np.empty(n, np.float32)
    n = 0
    for cell in probed:
        for leaf in range(cells.first_leaves[first + cell], cells.first_leaves[first + cell + 1]):
            above = cells.units[leaf] * dot_row(cells.codes[leaf], query)
            leaves[n] = leaf
            hopes[n] = means[cell] + above + reach * cells.leaf_spreads[leaf]
            n += 1
    best = np.empty(min(n, 1 + n_keys * (last_leaf - first_leaf) // n_members), np.int64)
    choose(hopes, best)
    return leaves[best]


@jit()
def dot_row(row: Array, query: Array) -> np.float32:
    total = np.float32(0)
    for d in range(len(query)):
        total += np.float32(row[d]) * query[d]
    return total


@jit(inline="always")
def pack(score: float, key: int) -> Any:
    bits = np.float32(score).view(np.uint32)
    # Flip so that unsigned order is descending order of the floats.
    bits = bits if bits >> np.uint32(31) else np.uint32(0x7FFFFFFF) - bits
    return (np.uint64(bits) << np.uint64(32)) | (np.uint64(key) << np.uint64(1))


@jit(inline="always")
def unpack_id(entry: int) -> Any:
    return np.int64((entry & np.uint64(0xFFFFFFFF)) >> np.uint64(1))


@jit(inline="always")
def unpack_score(entry: int) -> Any:
    bits = np.uint32(entry >> np.uint64(32))
    bits = bits if bits >> np.uint32(31) else np.uint32(0x7FFFFFFF) - bits
    return np.uint32(bits).view(np.float32)


@jit()
def insert(beam: Array, n: int, entry: int) -> tuple[int, int]:
    """Insert into the sorted beam of n entries; when it is full, the worst goes. Returns the new n, and the place."""
    low, high = 0, n
    while low < high:
        middle = (low + high) >> 1
        if beam[middle] < entry:
            low = middle + 1
        else:
            high = middle
    last = min(n, len(beam) - 1)
    shift_right(beam, low, last - low)
    beam[low] = entry
    return last + 1, low
