"""Contiguous pages of keys: their summaries are compared, the best pages are opened and searched exactly.

The cheapest index to build and to extend, and it reads memory in order; this is the page-level retrieval of RetroLM
and Quest, without a trained retriever. summary.py says what stands for a page, search.py compares.
"""

from os import PathLike
from typing import Any, NamedTuple, Self

import numba
import numpy as np

from retrieval_attn.arrays import Array, as_stored
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan_all
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.over_keys import OverKeys
from retrieval_attn.index.page.search import BLOCK, open_pages, score_pages
from retrieval_attn.index.page.summary import SCORES, PageSummaries, Scheme
from retrieval_attn.index.protocol import Batch, SearchResult, Steps, check_effort, check_search

# Page scores held at a time, 16 MiB: more queries than that go one part after the other.
MAX_SCORES = 1 << 22


class State(NamedTuple):
    """What changes on append; replaced as a whole.

    Keys after the last full page are in no summary and always read, so a key is found as soon as it is there and
    no summary is ever changed.
    """

    keys: Keys
    pages: PageSummaries


class PageIndex(OverKeys[State]):
    """Exact search inside the pages that score best. Effort is the number of pages opened per query."""

    kind = "page"

    @classmethod
    def build(
        cls,
        keys: Keys,
        queries: Array | None,
        seed: int,
        steps: Steps,
        page_size: int = 16,
        score: str = "halfway",
        n_reps: int = 2,
    ) -> Self:
        """Summarise every full page once. `queries` and `seed` are not used.

        page_size: keys per page, from 8 to 1024.
        score: what a page is judged by: "mean", "minmax" (a bound), "halfway" between the two, or "reps"
            (representative keys); see summary.py.
        n_reps: representatives per page, at most a quarter of its keys; for "reps" only.
        """
        if not 8 <= page_size <= 1024:
            raise ValueError(f"page_size must be between 8 and 1024, got {page_size}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
        if not 1 <= n_reps <= page_size // 4:
            raise ValueError(f"n_reps must be between 1 and {page_size // 4} (a quarter of page_size), got {n_reps}")
        return cls(State(keys, PageSummaries.of(Scheme(page_size, score, n_reps), keys, steps)))

    @property
    def nbytes(self) -> int:
        """Summaries, with room to grow."""
        return self._state.pages.nbytes + self._state.keys.bonus.nbytes

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; effort: pages opened per query, and never too few to hold k keys; `seeds` change nothing.

        Representatives are copies of keys: for "reps", all of them count as visited.
        """
        keys, pages = self._state
        batch = check_search(q, k, keys)
        n_keys, page_size = keys.shape[1], pages.scheme.page_size
        n_last = n_keys - pages.n_pages * page_size
        effort = max(check_effort(effort, default_effort(k, pages.n_pages)), -(-(k - n_last) // page_size))
        if effort >= pages.n_pages:
            return scan_all(keys, batch)
        return search_pages(keys, pages, batch, effort)

    def _grow(self, keys: Keys) -> None:
        """A page is summarised when it is full."""
        self._state = State(keys, self._state.pages.extended(keys))

    def _shrink(self, keys: Keys) -> None:
        pages = self._state.pages
        self._state = State(keys, pages.first(keys.shape[1] // pages.scheme.page_size))

    def _forked(self, state: State, keys: Keys) -> Self:
        return type(self)(State(keys, state.pages._replace(owner=False)))

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        keys, pages = self._state
        # Files hold no empty arrays.
        arrays = {"rows": pages.rows[:, : pages.n_pages]} if pages.n_pages else {}
        storage.write(path, self.kind, pages.scheme._asdict(), arrays, keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> Self:
        scheme, rows, keys = Scheme(**saved.settings), saved.arrays.get("rows"), saved.keys
        pages = PageSummaries.of(scheme, keys, Steps()) if rows is None else PageSummaries.around(scheme, rows, keys)
        return cls(State(keys, pages))


def default_effort(k: int, n_pages: int) -> int:
    """Two pages for each key wanted, and an eighth of all.

    The k best keys lie in almost k pages (100 in 93 of 16 tokens), and the order of pages errs in proportion to their
    number.
    """
    return 2 * k + n_pages // 8


def search_pages(keys: Keys, pages: PageSummaries, batch: Batch, effort: int) -> SearchResult:
    """Open the `effort` best pages for each query, fewer than there are."""
    n_heads, n_queries, _ = batch.queries.shape
    ids = np.empty((n_heads, n_queries, batch.k), np.int32)
    scores = np.empty((n_heads, n_queries, batch.k), np.float32)
    n_pages, rows = pages.n_pages, as_stored(pages.rows)
    n_chunks = max(1, min(-(-4 * numba.get_num_threads() // n_heads), n_pages // BLOCK))
    step = max(4, MAX_SCORES // (n_heads * n_pages) // 4 * 4)
    for first in range(0, n_queries, step):
        part = np.s_[:, first : first + step]
        queries = np.ascontiguousarray(batch.queries[part])
        page_scores = np.empty((n_heads, queries.shape[1], n_pages), np.float32)
        score_pages(rows, n_pages, pages.bonus, pages.scheme.asked(queries), n_chunks, page_scores)
        sizes = keys.shape[1], pages.scheme.page_size
        open_pages(keys.flat, *sizes, queries, page_scores, effort, ids[part], scores[part])
    n_read = (effort - n_pages) * pages.scheme.page_size + keys.shape[1]
    if pages.scheme.score == "reps":
        n_read += n_pages * pages.scheme.n_reps
    return batch.result(ids, scores, np.full((n_heads, n_queries), n_read, np.int64))
