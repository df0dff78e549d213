"""What every index offers, what it returns, and the checks all kinds share."""

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple, Protocol

import numpy as np

from retrieval_attn.arrays import BFLOAT16, Array, as_array, as_float32
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.lift import Lift


class SearchResult(NamedTuple):
    """The keys found for each query head, best first; short rows end in id -1, score -inf.

    ids: (H[, T], k) int32, positions in the indexed keys.
    scores: (H[, T], k) float32, raw inner products (unscaled); plus each key's bonus if the index is lifted.
    visited: (H[, T]) int64, keys whose vector or code was read. A key read once for a whole group counts for every
        head it was scored for. Centroids and stored queries are no keys and do not count.
    """

    ids: Array
    scores: Array
    visited: Array


class Index(Protocol):
    """Finds, for each query head, the stored keys of largest inner product. One object serves all heads of a layer."""

    kind: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, S, D): KV heads, keys, head dimension."""

    @property
    def n_keys(self) -> int: ...

    @property
    def lift(self) -> Lift | None:
        """What adds a random bonus to each key's score, so that the best keys are a weighted sample; usually None."""

    @property
    def nbytes(self) -> int:
        """Bytes of the index without the keys themselves; the bonuses of a lift count."""

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """The k keys of largest inner product for each query.

        q: (H, D) or (H, T, D), any float dtype; query head h reads the keys of KV head h // (H // G).
        effort: how hard to look (beam width of `graph`, lists probed by `ivf`, ignored by `exact`); None suits k.
        seeds: (H, n) or (H, T, n) ids to begin at, such as the last step's; -1 is skipped. Only `graph` uses them.
        With k >= S the result is exact and complete. Raises ValueError for k < 1, another D, an H that G does not
        divide, or queries that are not finite. Leaves the index unchanged; safe from many threads, also during append.
        """

    def append(self, new_keys: Any, *, keys: Any = None) -> None:
        """Add keys (G, n, D); their ids continue at S. They can be found as soon as this returns.

        keys: the caller's (G, S + n, D) array with the same leading rows, used in place from then on; without it the
        index keeps a growing copy. One append runs at a time (others wait); a search sees all of an append or nothing.
        """

    def truncate(self, n_keys: int) -> None:
        """Forget all keys from id `n_keys` on; 1 <= n_keys <= S, else ValueError. As safe as `append`."""

    def fork(self, keys: Any = None) -> "Index":
        """Another index over the same keys, at once: what is built is shared until one of the two changes it.

        keys: the fork's own (G, n, D) array, n >= S, whose first S rows are the indexed keys (ValueError if not, by a
        sample), used in place from then on. Without it the fork reads the rows where they are, and copies them when
        keys are appended to it. What is appended to or cut off either index is never seen by the other, which gives
        the same results to the bit. The first append to a fork may copy what was shared. Safe while another thread
        appends: the fork then has the keys of before that append or of after it, so `keys` had better hold them all.
        """

    def snapshot(self) -> "Index":
        """The index as it is now, for searching while this one goes on: a fork that shares the keys' memory, too.

        Keys are read in place: rows that this index has forgotten by `truncate` must stay unchanged in the caller's
        array for as long as the snapshot is searched.
        """

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """Write the index to one file, atomically; `load_index` reads it."""


class BuildCancelled(Exception):
    """Raised by build_index when `cancel()` returned true."""


class Steps:
    """Tells how far a build is, and ends it when asked."""

    def __init__(
        self, progress: Callable[[float], None] | None = None, cancel: Callable[[], bool] | None = None
    ) -> None:
        self._progress = progress
        self._cancel = cancel

    def reached(self, fraction: float) -> None:
        """Report that `fraction` of the work is done. Raises BuildCancelled if the caller wants no more."""
        if self._cancel is not None and self._cancel():
            raise BuildCancelled(f"build cancelled at {fraction:.0%}")
        if self._progress is not None:
            self._progress(fraction)

    def part(self, begun: float, share: float) -> "Steps":
        """Steps of a part of the work: its 0 to 1 are begun to begun + share of the whole."""
        return Steps(lambda fraction: self.reached(begun + share * fraction))


class Batch(NamedTuple):
    """The queries of one search, grouped by KV head: query head h, time t is row (h % R) * T + t of head h // R."""

    queries: Array  # (G, N, D) float32, C-contiguous, N = R * T
    lead: tuple[int, ...]  # (H,) or (H, T), as the caller asked
    k: int

    def result(self, ids: Array, scores: Array, visited: Array) -> SearchResult:
        """The caller's shapes, from (G, N, n) with n <= k and (G, N); padded to k."""
        short = self.k - ids.shape[2]
        if short:
            ids = np.pad(ids, ((0, 0), (0, 0), (0, short)), constant_values=-1)
            scores = np.pad(scores, ((0, 0), (0, 0), (0, short)), constant_values=-np.inf)
        shape = (*self.lead, self.k)
        return SearchResult(ids.reshape(shape), scores.reshape(shape), visited.reshape(self.lead))


def check_search(q: Any, k: int, keys: Keys) -> Batch:
    """The queries as a Batch, or ValueError."""
    n_heads, _, dim = keys.shape
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    queries = as_queries(q, "q", n_heads, dim, ndims=(2, 3))
    lead = queries.shape[:-1]
    return Batch(queries.reshape(n_heads, -1, dim), lead, int(k))


def as_queries(q: Any, name: str, n_heads: int, dim: int, ndims: tuple[int, ...] = (3,)) -> Array:
    """`q` as finite, C-contiguous float32 of the same shape, or ValueError."""
    array = as_array(q, name)
    if array.ndim not in ndims or array.shape[-1] != dim:
        wanted = " or ".join({2: f"(H, {dim})", 3: f"(H, T, {dim})"}[n] for n in ndims)
        raise ValueError(f"{name} must be {wanted} (query heads, queries, head dimension), got shape {array.shape}")
    if array.shape[0] == 0 or array.shape[0] % n_heads:
        raise ValueError(
            f"{name} must have a multiple of {n_heads} heads (the KV heads of the index), got {array.shape[0]}"
        )
    if array.dtype != BFLOAT16 and array.dtype.kind != "f":
        raise ValueError(f"{name} must be floating point (or bfloat16 as uint16 bits), got {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(as_float32(array))
    # One sum finds NaN and infinity without a temporary array; only a bad or huge sum needs the close look.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(array, axis=None)
    if not np.isfinite(total):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            head, *row = bad[0][:-1]
            where = f"head {head}" + (f", row {row[0]}" if row else "")
            raise ValueError(f"{name} must be finite, got NaN or infinity in {where}")
    return array


def lifted_queries(queries: Array, keys: Keys) -> Array:
    """Queries (..., D) as keys.lifted sees them: with a coordinate of 1 at the end if there is a lift."""
    if keys.lift is None:
        return queries
    return np.concatenate([queries, np.ones((*queries.shape[:-1], 1), np.float32)], axis=-1)


def check_truncate(n_keys: int, most: int) -> None:
    if not 1 <= n_keys <= most:
        raise ValueError(f"n_keys must be between 1 and {most} (keys in the index), got {n_keys}")


def check_effort(effort: int | None, default: int) -> int:
    if effort is None:
        return default
    if effort < 1:
        raise ValueError(f"effort must be at least 1, got {effort}")
    return int(effort)
