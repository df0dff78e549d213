"""faiss's HNSW and inverted file as people use them, behind the search of our indexes: the rivals of `bench recall`.

One faiss index per KV head, by inner product; the query heads of a group go in as one batch. Both keep float32 copies
of the keys, from which their mean is taken off first: no query's ranking changes by it, and HNSW finds far more.
"""

from collections.abc import Callable
from typing import Any

import faiss as _faiss
import numpy as np

from retrieval_attn.arrays import Array, as_array, as_float32
from retrieval_attn.index import SearchResult
from retrieval_attn.index.ivf import default_lists

# Its type stubs lack half of it.
faiss: Any = _faiss

RIVALS = ("hnsw", "faiss-ivf")

LINKS, EF_CONSTRUCTION = 32, 200


class Rival:
    """One layer's faiss indexes. Effort is efSearch of "hnsw", nprobe of "faiss-ivf"."""

    def __init__(self, kind: str, heads: list[Any], means: Array) -> None:
        self.kind = kind
        self._heads = heads
        self._means = means  # (G, D)

    @property
    def nbytes(self) -> int:
        """Bytes of all that faiss keeps, its copy of the keys included."""
        return sum(_nbytes(self.kind, index) for index in self._heads)

    @property
    def n_lists(self) -> int:
        """Lists of each head's inverted file."""
        return int(self._heads[0].nlist)

    def search(self, q: Any, k: int, *, effort: int | None = None) -> SearchResult:
        """As `Index.search`, for q (H, 1, D); one search at a time, because faiss counts what it visits globally."""
        queries = np.ascontiguousarray(as_float32(as_array(q, "q")))[:, 0]
        R = len(queries) // len(self._heads)
        stats = faiss.cvar.hnsw_stats if self.kind == "hnsw" else faiss.cvar.indexIVF_stats
        parameters = _parameters(self.kind, effort)
        found, visited = [], np.empty((len(queries), 1), np.int64)
        for g, index in enumerate(self._heads):
            stats.reset()
            found.append(index.search(queries[g * R : (g + 1) * R], k, params=parameters))
            visited[g * R : (g + 1) * R] = stats.ndis // R
        scores, ids = (np.concatenate(parts)[:, None] for parts in zip(*found, strict=True))
        scores = scores + np.einsum("hd,hd->h", queries, np.repeat(self._means, R, axis=0))[:, None, None]
        return SearchResult(ids.astype(np.int32), np.where(ids < 0, -np.inf, scores).astype(np.float32), visited)


class FrozenIndex:
    """An `Index` over faiss's HNSW, for the runtime: built once over a prompt, while keys that come later are scanned.

    Good for answers that are short beside their prompt. Not for `keys` of other lengths than it was built on, and not
    to be saved.
    """

    kind = "hnsw"
    lift = None

    def __init__(self, rival: Rival, keys: Any, n_built: int, n_keys: int) -> None:
        self._rival, self._keys, self._n_built, self.n_keys = rival, keys, n_built, n_keys

    @classmethod
    def build(cls, keys: Any, seed: int = 0) -> "FrozenIndex":
        """Over keys (G, S, D) in CPU memory."""
        return cls(build_rival("hnsw", keys, seed), keys, keys.shape[1], keys.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, S, D)."""
        return (self._keys.shape[0], self.n_keys, self._keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the graph and of faiss's copy of the keys."""
        return self._rival.nbytes

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """As `Index.search`; effort: efSearch, by default twice k."""
        queries = np.ascontiguousarray(as_float32(as_array(q, "q")))
        rows = queries[:, None] if queries.ndim == 2 else queries
        found = [self._one(rows[:, t : t + 1], k, effort or 2 * k) for t in range(rows.shape[1])]
        shape = queries.shape[:-1]
        ids, scores, visited = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return SearchResult(ids.reshape(*shape, k), scores.reshape(*shape, k), visited.reshape(shape))

    def _one(self, query: Array, k: int, effort: int) -> SearchResult:
        hit = self._rival.search(query, min(k, self._n_built), effort=effort)
        short = k - hit.ids.shape[-1]
        ids = np.pad(hit.ids, ((0, 0), (0, 0), (0, short)), constant_values=-1)
        scores = np.pad(hit.scores, ((0, 0), (0, 0), (0, short)), constant_values=-np.inf)
        if (n_late := self.n_keys - self._n_built) == 0:
            return SearchResult(ids, scores, hit.visited)
        late = np.repeat(
            as_float32(as_array(self._keys, "keys")[:, self._n_built : self.n_keys]),
            len(query) // self.shape[0],
            axis=0,
        )
        all_scores = np.concatenate([scores, np.einsum("htd,hnd->htn", query, late)], axis=-1)
        all_ids = np.concatenate(
            [ids, np.broadcast_to(np.arange(self._n_built, self.n_keys, dtype=np.int32), (*ids.shape[:2], n_late))],
            axis=-1,
        )
        order = np.argsort(-all_scores, axis=-1, kind="stable")[..., :k]
        best = [np.take_along_axis(x, order, axis=-1) for x in (all_ids, all_scores)]
        return SearchResult(best[0], best[1], hit.visited + n_late)

    def append(self, new_keys: Any, *, keys: Any = None) -> None:
        """The new keys (G, n, D) are the last of `keys`, which must be given, and are scanned from now on."""
        self._keys, self.n_keys = keys, self.n_keys + new_keys.shape[1]

    def truncate(self, n_keys: int) -> None:
        """Forget keys from `n_keys` on; ValueError if HNSW holds one of them."""
        if n_keys < self._n_built:
            raise ValueError(f"HNSW cannot forget keys: it was built over {self._n_built}, asked to keep {n_keys}")
        self.n_keys = n_keys

    def fork(self, keys: Any = None) -> "FrozenIndex":
        """Another one over the same keys; HNSW itself never changes."""
        return FrozenIndex(self._rival, self._keys if keys is None else keys, self._n_built, self.n_keys)

    snapshot = fork

    def save(self, path: Any, with_keys: bool = True) -> None:
        """Not offered."""
        raise ValueError("an HNSW index of a benchmark is not saved; build it anew")


def build_rival(
    kind: str, keys: Any, seed: int, n_lists: int | None = None, progress: Callable[[float], None] = lambda share: None
) -> Rival:
    """Build "hnsw" (32 links, efConstruction 200) or "faiss-ivf" (4 sqrt(S) lists) over keys (G, S, D).

    seed: of the clustering; HNSW seeds itself. Uses as many threads as faiss has been given.
    """
    array = as_array(keys, "keys")
    G, S, D = array.shape
    if n_lists is None:
        n_lists = default_lists(S)
    heads, means = [], np.empty((G, D), np.float32)
    for g in range(G):
        progress(g / G)
        points = as_float32(array[g])
        means[g] = points.mean(axis=0, dtype=np.float64)
        points = np.ascontiguousarray(points - means[g])
        index = _hnsw(D) if kind == "hnsw" else _inverted_file(points, n_lists, seed)
        index.add(points)
        heads.append(index)
    return Rival(kind, heads, means)


def _hnsw(D: int) -> Any:
    index = faiss.IndexHNSWFlat(D, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    return index


def _inverted_file(points: Array, n_lists: int, seed: int) -> Any:
    index = faiss.index_factory(points.shape[1], f"IVF{n_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1
    index.train(points)
    return index


def _parameters(kind: str, effort: int | None) -> Any:
    if effort is None:
        return None
    return faiss.SearchParametersHNSW(efSearch=effort) if kind == "hnsw" else faiss.SearchParametersIVF(nprobe=effort)


def _nbytes(kind: str, index: Any) -> int:
    rows = 4 * index.ntotal * index.d
    if kind == "hnsw":
        return rows + 4 * index.hnsw.neighbors.size() + 8 * index.hnsw.offsets.size() + 4 * index.hnsw.levels.size()
    return rows + 8 * index.ntotal + 4 * index.nlist * index.d
