"""Scoring pages by their summaries, and the exact search inside the best of them, for all heads of a layer."""

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import as_float, jit, prefetch
from retrieval_attn.index.keys import FlatKeys, HeadKeys, of_head
from retrieval_attn.index.loops.dots import add_run, dot, dots_4x1, dots_4x4
from retrieval_attn.index.loops.largest import choose
from retrieval_attn.index.loops.topk import best_first, offer

# Pages whose summaries are scored before the next queries look at them: they stay in the second-level cache.
BLOCK = 64


@jit(parallel=True)
def score_pages(rows: Array, n_pages: int, bonus: Array, asked: Array, n_chunks: int, out: Array) -> None:
    """out[g, i, p] = the score of page p for asked[g, i]: its best row's, plus the page's bonus if there are any.

    rows: (G, capacity, m, W), C-contiguous. asked: (G, N, W) float32. out: (G, N, n_pages) float32. A score that is
    no number, as overflow makes, becomes infinity: such a page had better be opened.
    """
    n_heads = len(asked)
    size = (n_pages + n_chunks - 1) // n_chunks
    for task in numba.prange(n_heads * n_chunks):
        head, chunk = task // n_chunks, task % n_chunks
        first = chunk * size
        score_chunk(rows[head], bonus[head], asked[head], first, min(first + size, n_pages), out[head])


@jit()
def score_chunk(rows: Array, bonus: Array, asked: Array, first: int, last: int, out: Array) -> None:
    n_rows, width = rows.shape[1:]
    flat = rows.reshape(-1)
    tile = np.empty((4, BLOCK * n_rows), np.float32)
    for block in range(first, last, BLOCK):
        n = min(BLOCK, last - block)
        for query in range(0, len(asked), 4):
            n_queries = min(4, len(asked) - query)
            score_rows(flat, block * n_rows * width, n * n_rows, asked, query, n_queries, tile)
            for i in range(n_queries):
                best_rows(tile[i], n_rows, out[query + i, block : block + n])
                if len(bonus):
                    add_run(out[query + i, block : block + n], bonus, block)


@jit()
def score_rows(flat: Array, start: int, n: int, asked: Array, first: int, n_queries: int, out: Array) -> None:
    """out[i, j] = <row j, asked[first + i]> for i < n_queries <= 4; rows follow each other from `start` on."""
    width = asked.shape[1]
    n_quads = n // 4
    for quad in range(n_quads):
        row = start + 4 * quad * width
        if n_queries == 4:
            dots_4x4(flat, row, width, asked, first, out, 4 * quad)
        else:
            for i in range(n_queries):
                dots_4x1(flat, row, width, asked[first + i], out[i, 4 * quad : 4 * quad + 4])
    for j in range(4 * n_quads, n):
        for i in range(n_queries):
            out[i, j] = dot(flat, start + j * width, asked[first + i])


@jit()
def best_rows(scores: Array, n_rows: int, out: Array) -> None:
    """out[p] = the largest of the n_rows scores of page p; not a number counts as infinity."""
    for page in range(len(out)):
        best = scores[page * n_rows]
        for j in range(1, n_rows):
            score = scores[page * n_rows + j]
            best = best if best >= score else score
        out[page] = best if best <= np.inf else np.inf


@jit(parallel=True)
def open_pages(
    keys: FlatKeys,
    n_keys: int,
    page_size: int,
    queries: Array,
    page_scores: Array,
    effort: int,
    ids: Array,
    scores: Array,
) -> None:
    """The best keys of the `effort` best pages, and of the keys after the last full page, for each query.

    page_scores: (G, N, P), P >= effort. Writes ids and scores (G, N, k), best first; the pages must hold k keys.
    """
    n_heads, n_queries, _ = page_scores.shape
    for task in numba.prange(n_heads * n_queries):
        head, query = task // n_queries, task % n_queries
        runs = best_pages(page_scores[head, query], effort, page_size)
        found = score_runs(of_head(keys, head), n_keys, page_size, queries[head, query], runs)
        keep_best(found, runs, page_size, ids[head, query], scores[head, query])


@jit()
def best_pages(page_scores: Array, effort: int, page_size: int) -> Array:
    """The first keys of the `effort` best pages, and of what comes after the last full page."""
    runs = np.empty(effort + 1, np.int64)
    choose(page_scores, runs[:effort])
    runs[effort] = len(page_scores)
    for i in range(effort + 1):
        runs[i] *= page_size
    return runs


@jit()
def score_runs(keys: HeadKeys, n_keys: int, page_size: int, query: Array, runs: Array) -> Array:
    """Scores of the `page_size` keys from each of `runs` on, and of the keys from the last one to the end."""
    values, base, stride, bonus = keys
    # Only the last run is shorter. `dots_run` may write three entries too many.
    out = np.empty((len(runs) - 1) * page_size + (n_keys - runs[-1]) + 3, np.float32)
    for i in range(len(runs)):
        # Pages are too short for the processor to guess where the next one is.
        if i + 1 < len(runs):
            for key in range(runs[i + 1], min(runs[i + 1] + page_size, n_keys)):
                prefetch(values, base + key * stride, len(query))
        at = i * page_size
        n = min(page_size, n_keys - runs[i])
        dots_run(values, base + runs[i] * stride, stride, n, query, out[at:])
        if len(bonus):
            add_run(out[at : at + n], bonus, runs[i])
    return out[:-3]


@jit()
def keep_best(found: Array, runs: Array, page_size: int, ids: Array, scores: Array) -> None:
    """ids, scores = the best of `found`, the scores of `runs`, best first."""
    places = np.empty(len(ids), np.int64)
    choose(found, places)
    n = 0
    for place in places:
        n = offer(scores, ids, n, found[place], runs[place // page_size] + place % page_size)
    best_first(scores, ids, n)


@jit()
def dots_run(flat: Array, row: int, stride: int, n: int, query: Array, out: Array) -> None:
    """out[j] = <key at row + j * stride, query> for j < n; up to out[n + 2] may be overwritten.

    Every key is summed in the same order, wherever it stands, so that equal keys get equal scores.
    """
    j = 0
    while j < n:
        n_done = 4 if j + 4 <= n else 1
        # The last few keys go one by one, as quads of the same key.
        dots_quad(flat, row + j * stride, stride if n_done == 4 else 0, query, out, j)
        j += n_done


@jit()
def dots_quad(flat: Array, row: int, stride: int, query: Array, out: Array, at: int) -> None:
    """out[at + j] = <key at row + j * stride, query> for j < 4.

    As `dots_4x1`; unsigned addresses in place of slices, which for one page at a time cost as much as the products.
    """
    zero = query[0] - query[0]
    a0, a1, a2, a3 = zero, zero, zero, zero
    first, step = np.uint64(row), np.uint64(stride)
    for d in range(len(query)):
        x = query[d]
        i = first + np.uint64(d)
        a0 += as_float(flat[i]) * x
        a1 += as_float(flat[i + step]) * x
        a2 += as_float(flat[i + step + step]) * x
        a3 += as_float(flat[i + step + step + step]) * x
    out[at], out[at + 1], out[at + 2], out[at + 3] = a0, a1, a2, a3
