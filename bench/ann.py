"""faiss's HNSW and inverted file as people use them, behind the search of our indexes: the rivals of `bench recall`.

One faiss index per KV head, by inner product; the query heads of a group go in as one batch. Both keep float32 copies
of the keys, from which their mean is taken off first: no query's ranking changes by it, and HNSW finds far more.
"""

from collections.abc import Callable
from typing import Any

import faiss as _faiss
import numpy as np

from retrieval_attn.host import Array, as_array, as_float32
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
