"""Exact scores for the candidates of the scan."""

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit, prefetch
from retrieval_attn.index.keys import FlatKeys, HeadKeys, of_head
from retrieval_attn.index.loops.dots import dot
from retrieval_attn.index.scan.dots import TILE
from retrieval_attn.index.scan.entries import Found, as_entry, keep_best, key_of, write_best

# Keys to ask memory for before the one being scored.
KEYS_AHEAD = 8

# From so many times the keys wanted on, entries are cut back to those wanted. A chunk that found more keeps so many, so
# that all chunks together show it, however many they are.
CUT = 2


@jit(parallel=True)
def rescore(
    keys: FlatKeys, queries: Array, start: int, stop: int, n_wanted: int, found: Found, ids: Array, scores: Array
) -> None:
    """The best keys by exact score, from the entries of the queries start..stop."""
    n_queries = stop - start
    for task in numba.prange(len(queries) * n_queries):
        head, query = task // n_queries, task % n_queries
        tile, row = query // TILE, query % TILE
        best = gather(found.entries[head, tile, :, row], found.counts[head, tile, :, row], n_wanted)
        put_scores(of_head(keys, head), queries[head, start + query], best)
        write_best(best, ids[head, start + query], scores[head, start + query])


@jit()
def gather(entries: Array, counts: Array, n_wanted: int) -> Array:
    """The entries (chunks, n) that all chunks found; if they are CUT times those wanted, the best."""
    together = np.empty(counts.sum(), np.int64)
    n = 0
    for chunk in range(len(counts)):
        together[n : n + counts[chunk]] = entries[chunk, : counts[chunk]]
        n += counts[chunk]
    if n >= CUT * n_wanted:
        keep_best(together, n, n_wanted)
        n = n_wanted
    return together[:n]


@jit()
def put_scores(keys: HeadKeys, query: Array, entries: Array) -> None:
    """Replace the estimates in the entries by exact scores."""
    values, base, stride, bonus = keys
    score = np.empty(1, np.float32)
    bits = score.view(np.int32)
    for i in range(-KEYS_AHEAD, len(entries)):
        if i + KEYS_AHEAD < len(entries):
            row = base + key_of(entries[i + KEYS_AHEAD]) * stride
            prefetch(values, row, len(query))
        if i >= 0:
            key = key_of(entries[i])
            score[0] = dot(values, base + key * stride, query)
            if len(bonus):
                score[0] += bonus[key]
            entries[i] = as_entry(bits[0], key)
