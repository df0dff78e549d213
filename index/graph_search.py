"""Best-first search of the graphs of all heads of a layer in one call."""

from typing import Any

import numba
import numpy as np

from retrieval_attn.host import Array, jit
from retrieval_attn.index.dots import dot, prefetch, shift_right, squared_distance

# A beam entry is one integer that sorts best score first, then smallest id: 32 bits of score, 31 of id, and the
# lowest bit set once the key's links were followed.
FOLLOWED = np.uint64(1)


@jit(parallel=True)
def search_graphs(
    values: Array, stride_g: int, stride_s: int, n_keys: int, links: Array, starts: Array,
    queries: Array, effort: int, ids: Array, scores: Array, visited: Array,
) -> None:  # fmt: skip
    """Search the graph of keys 0..n_keys for each query; the queries of all heads are shared among the cores.

    links: (G, capacity, M). starts: (G, N, n) ids, -1 skipped. queries: (G, N, D).
    Writes ids, scores (G, N, k), best first, and visited (G, N).
    """
    n_heads, n_queries, _ = queries.shape
    for task in numba.prange(n_heads * n_queries):
        head, query = task // n_queries, task % n_queries
        visited[head, query] = search_one(
            values, head * stride_g, stride_s, n_keys, links[head], starts[head, query], queries[head, query],
            False, effort, ids[head, query], scores[head, query],
        )  # fmt: skip


@jit()
def search_one(
    values: Array, base: int, stride: int, n_keys: int, links: Array, starts: Array, query: Array,
    by_distance: bool, effort: int, ids: Array, scores: Array,
) -> int:  # fmt: skip
    """Find the keys of largest inner product, or, by distance, the nearest. Returns the number of keys scored.

    The beam holds the best `effort` keys so far. The search ends when the links of all of them were followed.
    """
    # One bit per key: at 128K keys 16 KB, which stay in the first-level cache and cost nothing to clear.
    marks = np.zeros((n_keys + 63) >> 6, np.uint64)
    beam = np.empty(effort, np.uint64)
    n_links = links.shape[1]
    todo = np.empty(max(len(starts), n_links), np.int64)
    n_todo = 0
    for key in starts:
        if is_news(marks, key, n_keys):
            todo[n_todo] = key
            n_todo += 1
            prefetch_key(values, base + key * stride, len(query))
    n_beam, n_visited, at = 0, 0, 0
    while True:
        n_visited += n_todo
        for i in range(n_todo):
            row = base + todo[i] * stride
            score = -squared_distance(values, row, query) if by_distance else dot(values, row, query)
            entry = pack(score, todo[i])
            if n_beam < effort or entry < beam[n_beam - 1]:
                n_beam, place = insert(beam, n_beam, entry)
                if place <= at:
                    at = place
                    prefetch_row(links, todo[i])
        while at < n_beam and beam[at] & FOLLOWED:
            at += 1
        if at == n_beam:
            break
        node = unpack_id(beam[at])
        beam[at] |= FOLLOWED
        n_todo = 0
        for j in range(n_links):
            key = links[node, j]
            if key < 0:
                break
            # An append that runs now may have linked keys that this search does not know: they are no news.
            if is_news(marks, key, n_keys):
                todo[n_todo] = key
                n_todo += 1
                prefetch_key(values, base + key * stride, len(query))
    n = min(n_beam, len(ids))
    for i in range(n):
        ids[i] = unpack_id(beam[i])
        scores[i] = unpack_score(beam[i])
    ids[n:] = -1
    scores[n:] = -np.inf
    return n_visited


@jit(inline="always")
def is_news(marks: Array, key: int, n_keys: int) -> bool:
    """Whether `key` is a key not seen before; it is marked as seen."""
    if key < 0 or key >= n_keys:
        return False
    word, bit = np.int64(key) >> 6, np.uint64(1) << np.uint64(key & 63)
    if marks[word] & bit:
        return False
    marks[word] |= bit
    return True


@jit(inline="always")
def prefetch_key(values: Array, row: int, dim: int) -> None:
    for d in range(0, dim, 64 // values.itemsize):
        prefetch(values, row + d)


@jit(inline="always")
def prefetch_row(links: Array, key: int) -> None:
    flat = links.reshape(-1)
    for j in range(0, links.shape[1], 16):
        prefetch(flat, key * links.shape[1] + j)


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
