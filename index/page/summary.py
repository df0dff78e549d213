"""What stands for a page of keys while pages are compared: one or a few rows per page, of the keys' own dtype; or, as
the means of int8 keys are no such numbers, in bfloat16, which holds these keys themselves exactly.

mean: the mean of the page's keys; a page scores what its average key scores.
minmax: per dimension the largest and the smallest element of any key (Quest, Tang et al., ICML 2024). A query takes the
    one its sign prefers, so a page scores no less than its best key. Both are elements of stored keys: nothing is
    rounded, and what is summed over them bounds every key's sum term by term.
halfway: halfway between the two. The bound adds up extremes that no single key has, the mean hides the one key that
    counts. At 128K keys, 16 per page, 2 % of them opened, recall@100 on the three layers of the embedded model and on
    shaped vectors is 0.80 0.27 0.72 0.48 by mean, 0.78 0.39 0.62 0.41 by minmax and 0.82 0.43 0.73 0.48 halfway.
reps: copies of a few keys far from the page's mean and from each other; a page scores what the best of them scores.
    Finds lone keys best, but reading the copies is reading keys.
"""

from typing import NamedTuple

import numba
import numpy as np

from retrieval_attn.arrays import BFLOAT16, Array
from retrieval_attn.compiled import as_float, jit
from retrieval_attn.index.keys import INT8, Keys
from retrieval_attn.index.loops.dots import read_key, squared_distance
from retrieval_attn.index.protocol import Steps

SCORES = ("mean", "minmax", "halfway", "reps")


class Scheme(NamedTuple):
    """How pages are cut and summarised."""

    page_size: int
    score: str
    n_reps: int

    def shape(self, dim: int) -> tuple[int, int]:
        """(m, W): rows per page and their length."""
        return (self.n_reps if self.score == "reps" else 1, 2 * dim if self.has_two_sides else dim)

    @property
    def has_two_sides(self) -> bool:
        """Whether a row is one for the positive elements of a query, then one for the negative."""
        return self.score in ("minmax", "halfway")

    def asked(self, queries: Array) -> Array:
        """Queries (G, N, D) as rows (G, N, W) whose inner product with a page's row is the page's score."""
        if not self.has_two_sides:
            return queries
        return np.concatenate([np.maximum(queries, 0), np.minimum(queries, 0)], axis=2)

    def summaries(self, keys: Keys, heads: range, first: int, last: int) -> Array:
        """Pages first..last of some heads that follow each other: (n, last - first, m, W), as `PageSummaries.rows`."""
        out = np.empty((len(heads), last - first, *self.shape(keys.shape[2])), np.float32)
        summarise = {
            "mean": write_means,
            "minmax": write_bounds,
            "halfway": write_halfway,
            "reps": write_representatives,
        }[self.score]
        values, stride_g, stride_s, _ = keys.flat
        start = heads.start * stride_g + first * self.page_size * stride_s
        summarise(values, start, stride_g, stride_s, self.page_size, out)
        return rounded(out, row_dtype(keys))


class PageSummaries(NamedTuple):
    """The summaries of all full pages.

    rows: (G, capacity, m, W), C-contiguous, see `row_dtype`; those past `n_pages` are room to grow.
    bonus: (G, capacity) float32, the largest bonus of any key of the page; (G, 0) without a lift.
    owner: whether nobody else reads or writes behind n_pages, so that new pages may go there.
    """

    scheme: Scheme
    rows: Array
    bonus: Array
    n_pages: int
    owner: bool

    @classmethod
    def of(cls, scheme: Scheme, keys: Keys, steps: Steps) -> "PageSummaries":
        """Summarise all full pages of `keys`."""
        n_heads, n_keys, dim = keys.shape
        n_pages = n_keys // scheme.page_size
        rows = np.empty((n_heads, n_pages, *scheme.shape(dim)), row_dtype(keys))
        for head in range(n_heads):
            steps.reached(head / n_heads)
            rows[head] = scheme.summaries(keys, range(head, head + 1), 0, n_pages)[0]
        steps.reached(1.0)
        return cls.around(scheme, rows, keys)

    @classmethod
    def around(cls, scheme: Scheme, rows: Array, keys: Keys) -> "PageSummaries":
        """Pages with these rows (G, n, m, W), which summarise the first n pages of `keys`."""
        n_pages = rows.shape[1]
        return cls(scheme, rows, largest_bonus(keys, scheme.page_size, 0, n_pages), n_pages, True)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.bonus.nbytes

    def extended(self, keys: Keys) -> "PageSummaries":
        """With the pages that `keys`, the old keys and more, have filled since. O(D) per key, amortised."""
        scheme, old = self.scheme, self.n_pages
        n_pages = keys.shape[1] // scheme.page_size
        if n_pages == old:
            return self
        rows = self._with_room(self.rows, n_pages)
        rows[:, old:n_pages] = scheme.summaries(keys, range(len(rows)), old, n_pages)
        bonus = self.bonus
        if keys.lift:
            bonus = self._with_room(bonus, n_pages)
            bonus[:, old:n_pages] = largest_bonus(keys, scheme.page_size, old, n_pages)
        return PageSummaries(scheme, rows, bonus, n_pages, True)

    def first(self, n_pages: int) -> "PageSummaries":
        """The first n_pages of these. What grows from here leaves the rows that older objects read alone."""
        return self._replace(n_pages=n_pages, owner=self.owner and n_pages == self.n_pages)

    def _with_room(self, array: Array, n_pages: int) -> Array:
        """`array` with room for n_pages that nobody else uses: itself, or a copy with a sixteenth to spare."""
        if self.owner and array.shape[1] >= n_pages:
            return array
        roomy = np.empty((len(array), n_pages + n_pages // 16, *array.shape[2:]), array.dtype)
        roomy[:, : self.n_pages] = array[:, : self.n_pages]
        return roomy


def largest_bonus(keys: Keys, page_size: int, first: int, last: int) -> Array:
    """(G, last - first) float32, of pages first..last; (G, 0) without a lift."""
    if keys.lift is None:
        return keys.bonus
    paged = keys.bonus[:, first * page_size : last * page_size].reshape(len(keys.bonus), last - first, page_size)
    return paged.max(axis=2)


def row_dtype(keys: Keys) -> np.dtype:
    """The stored dtype of summaries: that of the keys, if it has more than whole numbers."""
    return BFLOAT16 if keys.array.dtype == INT8 else keys.array.dtype


def rounded(x: Array, dtype: np.dtype) -> Array:
    """float32 `x`, finite, to the nearest of a stored dtype; bfloat16 as uint16 bits."""
    if dtype != BFLOAT16:
        return x.astype(dtype, copy=False)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(BFLOAT16)


@jit(parallel=True)
def write_means(values: Array, start: int, stride_g: int, stride_s: int, page_size: int, out: Array) -> None:
    """out[g, p, 0] = mean of the keys of page p of head g.

    Here and below: out is (G, n, m, W) float32; the first key of page p of head g is at
    start + g * stride_g + p * page_size * stride_s.
    """
    n_pages = out.shape[1]
    # Each key is scaled before it is added: a sum of large keys could overflow, their mean cannot.
    share = np.float32(1.0 / page_size)
    for task in numba.prange(len(out) * n_pages):
        head, page = task // n_pages, task % n_pages
        out[head, page, 0] = 0.0
        add_keys(
            values,
            start + head * stride_g + page * page_size * stride_s,
            stride_s,
            page_size,
            share,
            out[head, page, 0],
        )


@jit(parallel=True)
def write_bounds(values: Array, start: int, stride_g: int, stride_s: int, page_size: int, out: Array) -> None:
    """out[g, p, 0] = the largest elements of the page's keys, then the smallest."""
    n_pages, dim = out.shape[1], out.shape[3] // 2
    for task in numba.prange(len(out) * n_pages):
        head, page = task // n_pages, task % n_pages
        row = start + head * stride_g + page * page_size * stride_s
        write_box(values, row, stride_s, page_size, out[head, page, 0, :dim], out[head, page, 0, dim:])


@jit(parallel=True)
def write_halfway(values: Array, start: int, stride_g: int, stride_s: int, page_size: int, out: Array) -> None:
    """As `write_bounds`, but each bound is moved halfway to the mean."""
    n_pages, dim = out.shape[1], out.shape[3] // 2
    half, share = np.float32(0.5), np.float32(0.5 / page_size)
    for task in numba.prange(len(out) * n_pages):
        head, page = task // n_pages, task % n_pages
        row = start + head * stride_g + page * page_size * stride_s
        bounds = out[head, page, 0]
        write_box(values, row, stride_s, page_size, bounds[:dim], bounds[dim:])
        for d in range(2 * dim):
            bounds[d] *= half
        add_keys(values, row, stride_s, page_size, share, bounds[:dim])
        add_keys(values, row, stride_s, page_size, share, bounds[dim:])


@jit(parallel=True)
def write_representatives(values: Array, start: int, stride_g: int, stride_s: int, page_size: int, out: Array) -> None:
    """out[g, p] = the key farthest from the page's mean, then, each time, the key farthest from those taken."""
    n_pages, n_reps, dim = out.shape[1:]
    share = np.float32(1.0 / page_size)
    for task in numba.prange(len(out) * n_pages):
        head, page = task // n_pages, task % n_pages
        row = start + head * stride_g + page * page_size * stride_s
        centre = np.zeros(dim, np.float32)
        add_keys(values, row, stride_s, page_size, share, centre)
        apart = np.empty(page_size, np.float32)
        for j in range(page_size):
            apart[j] = squared_distance(values, row + j * stride_s, centre)
        for i in range(n_reps):
            taken = out[head, page, i]
            read_key(values, row + np.argmax(apart) * stride_s, taken)
            for j in range(page_size):
                distance = squared_distance(values, row + j * stride_s, taken)
                apart[j] = distance if i == 0 else min(apart[j], distance)


@jit()
def add_keys(values: Array, row: int, stride: int, n: int, share: float, total: Array) -> None:
    """total += share * the sum of n keys from `row` on."""
    for j in range(n):
        key = values[row + j * stride : row + j * stride + len(total)]
        for d in range(len(total)):
            total[d] += share * as_float(key[d])


@jit()
def write_box(values: Array, row: int, stride: int, n: int, high: Array, low: Array) -> None:
    """The largest and the smallest of each element among n keys from `row` on."""
    read_key(values, row, high)
    low[:] = high
    for j in range(1, n):
        key = values[row + j * stride : row + j * stride + len(high)]
        for d in range(len(high)):
            x = as_float(key[d])
            high[d] = x if x > high[d] else high[d]
            low[d] = x if x < low[d] else low[d]
