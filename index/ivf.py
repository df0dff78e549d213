"""faiss inverted lists per KV head: the usual approximate-search baseline.

Keys are centred first: that changes no query's ranking, and clusters then follow the keys' differences instead of
their common mean. Returned scores are recomputed on the stored keys. faiss keeps its own float32 copy of the keys.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, NamedTuple, Self

import faiss
import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan, scan_all
from retrieval_attn.index.keys import FlatKeys, Keys, of_head
from retrieval_attn.index.loops.dots import dot
from retrieval_attn.index.loops.topk import best_first, offer
from retrieval_attn.index.over_keys import OverKeys
from retrieval_attn.index.protocol import (
    SearchResult,
    Steps,
    check_effort,
    check_search,
    lifted_queries,
)

# New keys are scanned exactly until they are this share of the listed ones; then the lists are copied and extended.
# A fixed share makes the copying cost per appended key constant.
TAIL_SHARE = 1 / 16
MIN_TAIL = 2048

# Keys are clustered anew once there are so many times those that the centroids were made from: later keys that crowd
# into few old lists are found less and less.
RECLUSTER = 1.5


class Clustering(NamedTuple):
    """How lists are made. nlist: None for the default of so many keys."""

    nlist: int | None
    iterations: int
    seed: int


class Lists(NamedTuple):
    """The inverted lists of one KV head, and what probing them needs."""

    index: Any  # faiss.IndexIVFFlat
    centroids: Array  # (nlist, D) float32
    sizes: Array  # (nlist,) int64

    @classmethod
    def of(cls, index: Any) -> "Lists":
        sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
        return cls(index, index.quantizer.reconstruct_n(0, index.nlist), sizes)

    def extended(self, points: Array) -> "Lists":
        """A copy that holds `points` (n, D) too."""
        index = faiss.clone_index(self.index)
        index.add(np.ascontiguousarray(points))
        return Lists.of(index)

    def shortened(self, n_keys: int) -> "Lists":
        """A copy without the points from `n_keys` on."""
        index = faiss.clone_index(self.index)
        unwanted: Any = np.arange(n_keys, index.ntotal, dtype=np.int64)
        index.remove_ids(unwanted)
        return Lists.of(index)

    def probe(self, queries: Array, k: int, nprobe: int) -> tuple[Array, Array]:
        """Ids (N, k), -1 padded, and how many keys were read for each query."""
        # Keys were assigned by distance, but the lists worth opening are those of largest inner product.
        affinity = queries @ self.centroids.T
        nearest = np.ascontiguousarray(np.argpartition(-affinity, nprobe - 1, axis=1)[:, :nprobe])
        coarse = np.ascontiguousarray(np.take_along_axis(affinity, nearest, axis=1))
        scores = np.empty((len(queries), k), np.float32)
        ids = np.empty((len(queries), k), np.int64)
        # faiss's Python method takes no parameters here, and its nprobe setter would be seen by other threads.
        given, found = (faiss.swig_ptr(queries), k), map(faiss.swig_ptr, (nearest, coarse, scores, ids))
        parameters: Any = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
        self.index.search_preassigned_c(len(queries), *given, *found, False, parameters)
        return ids, self.sizes[nearest].sum(axis=1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads in which this process probes lists. In each, faiss starts no threads of its own."""
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return ThreadPoolExecutor(most, "ivf", lambda: faiss.omp_set_num_threads(1))


# A child process has none of its parent's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def probe_heads(lists: tuple[Lists, ...], queries: Array, k: int, nprobe: int) -> list[tuple[Array, Array]]:
    """What `Lists.probe` gives for each head, on as many threads as numba's loops may use here."""

    def probe(heads: range) -> list[tuple[Array, Array]]:
        return [lists[head].probe(queries[head], k, nprobe) for head in heads]

    n_heads, n_threads = len(lists), numba.get_num_threads()
    shares = [range(n_heads * i // n_threads, n_heads * (i + 1) // n_threads) for i in range(n_threads)]
    return [found for share in _pool().map(probe, shares) for found in share]


class State(NamedTuple):
    """Replaced as a whole, never changed: a search that holds an old one stays valid.

    mean: (G, D) float32, what was taken off the keys. n_seen: the keys that the centroids were made from.
    """

    keys: Keys
    lists: tuple[Lists, ...]
    mean: Array
    n_seen: int


class IVFIndex(OverKeys[State]):
    """One faiss IndexIVFFlat (inner product) per KV head. Effort is the number of lists probed."""

    kind = "ivf"

    def __init__(self, state: State, clustering: Clustering) -> None:
        super().__init__(state)
        self._clustering = clustering

    @classmethod
    def build(
        cls,
        keys: Keys,
        queries: Array | None,
        seed: int,
        steps: Steps,
        nlist: int | None = None,
        train_iterations: int = 10,
    ) -> Self:
        """Cluster the keys of each head. `queries` are not used.

        nlist: clusters per head; None: 4 sqrt(S), at most one per 39 keys (what faiss asks for training).
        train_iterations: of k-means.
        """
        if nlist is not None and not 1 <= nlist <= keys.shape[1]:
            raise ValueError(f"nlist must be between 1 and {keys.shape[1]} (keys per head), got {nlist}")
        if train_iterations < 1:
            raise ValueError(f"train_iterations must be at least 1, got {train_iterations}")
        clustering = Clustering(nlist, train_iterations, seed)
        return cls(cluster(keys, clustering, steps), clustering)

    @property
    def nbytes(self) -> int:
        """float32 keys and int64 ids in the lists, centroids, means."""
        keys, lists, mean, _ = self._state
        dim = mean.shape[1]
        in_lists = sum(x.index.ntotal * (4 * dim + 8) + x.centroids.nbytes for x in lists)
        return int(in_lists + mean.nbytes + keys.bonus.nbytes)

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; effort: lists probed per head, by default one in four; `seeds` change nothing."""
        keys, lists, *_ = self._state
        batch = check_search(q, k, keys)
        n_keys = keys.shape[1]
        n_listed, nlist = lists[0].index.ntotal, len(lists[0].sizes)
        nprobe = min(check_effort(effort, max(1, nlist // 4)), nlist)
        if k >= n_keys:
            return scan_all(keys, batch)
        n_found = min(k, n_listed)
        asked = lifted_queries(batch.queries, keys)
        found = probe_heads(lists, asked, n_found, nprobe)
        tail_ids, _ = scan(keys, batch.queries, k, n_listed, n_keys)
        candidates = np.concatenate([np.stack([ids for ids, _ in found]).astype(np.int32), tail_ids], axis=2)
        ids, scores = rescore(keys, batch.queries, candidates, k)
        return batch.result(ids, scores, np.stack([visited for _, visited in found]) + (n_keys - n_listed))

    def _grow(self, keys: Keys) -> None:
        """When there are half as many keys again, all are clustered anew, at once."""
        _, lists, mean, n_seen = self._state
        n_keys, n_listed = keys.shape[1], lists[0].index.ntotal
        if n_keys >= max(RECLUSTER * n_seen, MIN_TAIL):
            self._state = cluster(keys, self._clustering, Steps())
            return
        if n_keys - n_listed > max(MIN_TAIL, TAIL_SHARE * n_listed):
            lists = tuple(x.extended(keys.lifted(head)[n_listed:] - mean[head]) for head, x in enumerate(lists))
        self._state = State(keys, lists, mean, n_seen)

    def _shrink(self, keys: Keys) -> None:
        _, lists, mean, n_seen = self._state
        n_keys = keys.shape[1]
        if n_keys < lists[0].index.ntotal:
            lists = tuple(x.shortened(n_keys) for x in lists)
        # What is left of the keys that the centroids were made from: others may follow.
        self._state = State(keys, lists, mean, min(n_seen, n_keys))

    def _forked(self, state: State, keys: Keys) -> Self:
        return type(self)(state._replace(keys=keys), self._clustering)

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        keys, lists, mean, n_seen = self._state
        settings = {**self._clustering._asdict(), "n_seen": n_seen}
        arrays = {f"lists.{head}": faiss.serialize_index(x.index) for head, x in enumerate(lists)}
        storage.write(path, self.kind, settings, {**arrays, "mean": mean}, keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> Self:
        n_heads = saved.keys.shape[0]
        lists = tuple(Lists.of(faiss.deserialize_index(saved.arrays[f"lists.{head}"])) for head in range(n_heads))
        settings = dict(saved.settings)
        n_seen = settings.pop("n_seen")
        return cls(State(saved.keys, lists, saved.arrays["mean"], n_seen), Clustering(**settings))


def default_lists(n_keys: int) -> int:
    """Clusters for so many keys: 4 sqrt(S), at most one per 39 keys (what faiss asks for training)."""
    return max(1, min(int(4 * n_keys**0.5), n_keys // 39))


def cluster(keys: Keys, clustering: Clustering, steps: Steps) -> State:
    """All keys in lists made from them."""
    n_heads, n_keys, _ = keys.shape
    nlist = default_lists(n_keys) if clustering.nlist is None else clustering.nlist
    means, lists = [], []
    for head in range(n_heads):
        steps.reached(head / n_heads)
        points = keys.lifted(head)
        means.append(points.mean(axis=0, dtype=np.float64).astype(np.float32))
        lists.append(_cluster(points - means[-1], nlist, clustering.seed, clustering.iterations))
    steps.reached(1.0)
    return State(keys, tuple(lists), np.stack(means), n_keys)


def _cluster(points: Array, nlist: int, seed: int, iterations: int) -> Lists:
    dim = points.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.niter = iterations
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = 64
    index.train(points)
    index.add(points)
    return Lists.of(index)


def rescore(keys: Keys, queries: Array, candidates: Array, k: int) -> tuple[Array, Array]:
    """The k best of the candidates (G, N, C) int32, -1 skipped, by inner product with the stored keys and bonus."""
    n_heads, n_queries, _ = candidates.shape
    ids = np.full((n_heads, n_queries, k), -1, np.int32)
    scores = np.full((n_heads, n_queries, k), -np.inf, np.float32)
    _rescore(keys.flat, queries, candidates, ids, scores)
    return ids, scores


@jit()
def _rescore(keys: FlatKeys, queries: Array, candidates: Array, ids: Array, scores: Array) -> None:
    for head in range(candidates.shape[0]):
        values, start, stride, bonus = of_head(keys, head)
        for query in range(candidates.shape[1]):
            n = 0
            for key in candidates[head, query]:
                if key >= 0:
                    score = dot(values, start + key * stride, queries[head, query])
                    if len(bonus):
                        score += bonus[key]
                    n = offer(scores[head, query], ids[head, query], n, score, key)
            best_first(scores[head, query], ids[head, query], n)
