"""Brute force over the stored keys: the oracle, and the honest baseline.

Each key is loaded once for all queries of its group. Compute is sixteen sums per key quad, so a group of four heads
runs at about the speed of memory.
"""

from os import PathLike
from typing import Any, NamedTuple, Self

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index import storage
from retrieval_attn.index.keys import FlatKeys, HeadKeys, Keys, of_head
from retrieval_attn.index.loops.dots import add_run, dot, dots_4x1, dots_4x4
from retrieval_attn.index.loops.topk import best_first, offer, offer_run
from retrieval_attn.index.over_keys import OverKeys
from retrieval_attn.index.protocol import Batch, SearchResult, Steps, check_effort, check_search

# Keys scored before their scores are sorted in: 128 rows of bfloat16 at D = 128 stay in the first-level cache.
BLOCK = 128

# A chunk shorter than this costs more to hand to a thread than to scan.
MIN_CHUNK = 1024


class State(NamedTuple):
    """Nothing but the keys."""

    keys: Keys


class ExactIndex(OverKeys[State]):
    """All keys, every time. Nothing to build; obeys the protocol of `Index`."""

    kind = "exact"

    @classmethod
    def build(cls, keys: Keys, queries: Array | None, seed: int, steps: Steps) -> Self:
        steps.reached(1.0)
        return cls(State(keys))

    @property
    def nbytes(self) -> int:
        return self._state.keys.bonus.nbytes

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; `effort` and `seeds` change nothing."""
        keys = self._state.keys
        batch = check_search(q, k, keys)
        check_effort(effort, 1)
        return scan_all(keys, batch)

    def _grow(self, keys: Keys) -> None:
        self._state = State(keys)

    def _shrink(self, keys: Keys) -> None:
        self._state = State(keys)

    def _forked(self, state: State, keys: Keys) -> Self:
        return type(self)(State(keys))

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        storage.write(path, self.kind, {}, {}, self._state.keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> Self:
        return cls(State(saved.keys))


def scan_all(keys: Keys, batch: Batch) -> SearchResult:
    """What a search finds that reads every key."""
    n_keys = keys.shape[1]
    ids, scores = scan(keys, batch.queries, batch.k, 0, n_keys)
    return batch.result(ids, scores, np.full(ids.shape[:2], n_keys, np.int64))


def scan(keys: Keys, queries: Array, k: int, start: int, stop: int) -> tuple[Array, Array]:
    """The best keys among start..stop for each query: ids (G, N, n) int32 and scores, n = min(k, stop - start).

    queries: (G, N, D) float32, C-contiguous. All cores work, also when G is 1.
    """
    n_heads, n_queries, _ = queries.shape
    n_keys = stop - start
    n_best = min(k, n_keys)
    if n_best <= 0:
        return np.empty((n_heads, n_queries, 0), np.int32), np.empty((n_heads, n_queries, 0), np.float32)
    # Four chunks per thread even out threads that share their core with other work.
    n_chunks = max(1, min(-(-4 * numba.get_num_threads() // n_heads), n_keys // MIN_CHUNK))
    ids = np.empty((n_heads, n_queries, n_best), np.int32)
    scores = np.empty((n_heads, n_queries, n_best), np.float32)
    size = -(-n_keys // n_chunks)
    part_shape = (n_heads, n_chunks, n_queries, min(n_best, size))
    part_ids, part_scores = np.empty(part_shape, np.int32), np.empty(part_shape, np.float32)
    sizes = np.empty((n_heads, n_chunks), np.int64)
    scan_chunks(keys.flat, queries, start, stop, size, part_ids, part_scores, sizes)
    merge_chunks(part_ids, part_scores, sizes, ids, scores)
    return ids, scores


@jit(parallel=True)
def scan_chunks(
    keys: FlatKeys, queries: Array, start: int, stop: int, size: int, ids: Array, scores: Array, sizes: Array
) -> None:
    """Heaps of the best keys of each chunk of `size`: ids and scores (G, chunks, N, n), sizes (G, chunks)."""
    n_heads, n_chunks = sizes.shape
    for task in numba.prange(n_heads * n_chunks):
        head, chunk = task // n_chunks, task % n_chunks
        first = start + chunk * size
        last = min(first + size, stop)
        sizes[head, chunk] = scan_chunk(
            of_head(keys, head), queries[head], first, last, ids[head, chunk], scores[head, chunk]
        )


@jit(parallel=True)
def merge_chunks(part_ids: Array, part_scores: Array, sizes: Array, ids: Array, scores: Array) -> None:
    """The best of what the chunks found, best first."""
    n_heads, n_queries, _ = ids.shape
    for task in numba.prange(n_heads * n_queries):
        head, query = task // n_queries, task % n_queries
        merge_heaps(
            part_ids[head, :, query], part_scores[head, :, query], sizes[head], ids[head, query], scores[head, query]
        )


@jit()
def merge_heaps(part_ids: Array, part_scores: Array, sizes: Array, ids: Array, scores: Array) -> None:
    """ids, scores (n,) = the n best of all chunks' heaps (chunks, m), best first. The heaps hold at least n."""
    n = 0
    for chunk in range(len(sizes)):
        for j in range(sizes[chunk]):
            n = offer(scores, ids, n, part_scores[chunk, j], part_ids[chunk, j])
    best_first(scores, ids, n)


@jit()
def scan_chunk(keys: HeadKeys, queries: Array, first: int, last: int, ids: Array, scores: Array) -> int:
    """Heaps of the best among keys first..last, one per query. Returns how many each holds."""
    values, base, stride, bonus = keys
    n_queries = len(queries)
    tile = np.empty((4, BLOCK), np.float32)
    sizes = np.zeros(n_queries, np.int64)
    for block in range(first, last, BLOCK):
        n_keys = min(BLOCK, last - block)
        n_quads = n_keys // 4
        for query in range(0, n_queries, 4):
            width = min(4, n_queries - query)
            for quad in range(n_quads):
                row = base + (block + 4 * quad) * stride
                if width == 4:
                    dots_4x4(values, row, stride, queries, query, tile, 4 * quad)
                else:
                    for i in range(width):
                        dots_4x1(values, row, stride, queries[query + i], tile[i, 4 * quad : 4 * quad + 4])
            for j in range(4 * n_quads, n_keys):
                for i in range(width):
                    tile[i, j] = dot(values, base + (block + j) * stride, queries[query + i])
            for i in range(width):
                at = query + i
                if len(bonus):
                    add_run(tile[i, :n_keys], bonus, block)
                sizes[at] = offer_run(scores[at], ids[at], sizes[at], tile[i, :n_keys], block)
    return min(last - first, ids.shape[1]) if last > first else 0
