"""Finding, for a query, the stored keys of largest inner product.

    index = build_index("graph", keys, queries)     # keys (G, S, D), queries (H, T, D) or None
    hit = index.search(q, k=100)                    # q (H, D): hit.ids, hit.scores, hit.visited

Knows NumPy, numba and faiss; never a model.
"""

import functools
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np

from retrieval_attn.index import storage
from retrieval_attn.index.exact import ExactIndex
from retrieval_attn.index.graph.index import GraphIndex
from retrieval_attn.index.ivf import IVFIndex
from retrieval_attn.index.keys import Keys, check_keys
from retrieval_attn.index.lift import Lift
from retrieval_attn.index.page.index import PageIndex
from retrieval_attn.index.protocol import BuildCancelled, Index, SearchResult, Steps, as_queries
from retrieval_attn.index.scan.index import ScanIndex
from retrieval_attn.threads.pool import require_safe_threads

__all__ = ["INDEX_KINDS", "BuildCancelled", "Index", "SearchResult", "build_index", "load_index"]

_KINDS: dict[str, Any] = {
    "exact": ExactIndex,
    "ivf": IVFIndex,
    "graph": GraphIndex,
    "scan": ScanIndex,
    "page": PageIndex,
}

INDEX_KINDS = tuple(_KINDS)


def build_index(
    kind: str,
    keys: Any,
    queries: Any = None,
    *,
    seed: int = 0,
    lift: float | None = None,
    progress: Callable[[float], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Index:
    """Build one index for all KV heads of a layer.

    kind: one of INDEX_KINDS.
    keys: (G, S, D) NumPy array or CPU torch tensor, float32, float16, bfloat16 (in NumPy: uint16 bits) or int8, S >= 1.
        Not copied: the caller keeps these rows unchanged as long as the index lives. Rows must be contiguous. int8
        keys are plain numbers: where they stand for larger or smaller ones, multiply all queries by what one is worth.
    queries: (H, T, D), a sample of the queries the model asked during prefill; H a multiple of G; or None.
    seed: the same input and seed give the same index.
    lift: None, or the softmax scale (usually D ** -0.5): keys are then ranked with a random bonus, drawn from the seed,
        that makes the best keys a weighted sample of all (see lift.py).
    progress: called with the fraction done; cancel: asked between blocks, ends the build with BuildCancelled.
    options: of the kind; see the `build` method of its class.
    Raises ValueError for anything else, TypeError for things that are no arrays.
    """
    index_class = _kind(kind)
    allowed = list(inspect.signature(index_class.build).parameters)[4:]
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"unknown option {name!r} for index kind {kind!r}; "
                + (f"choose from {', '.join(allowed)}" if allowed else "it takes none, so leave it out")
            )
    array = check_keys(keys, "keys")
    if array.shape[1] == 0:
        raise ValueError("keys must hold at least one key per head to build an index, got S = 0")
    if queries is not None:
        queries = as_queries(queries, "queries", array.shape[0], array.shape[2])
    prepare(kind, array.dtype)
    built_on = Keys(array, lift=None if lift is None else Lift(lift, seed, len(array)))
    return index_class.build(built_on, queries, seed, Steps(progress, cancel), **options)


def load_index(path: str | PathLike[str], keys: Any = None, *, verified: bool = False) -> Index:
    """Read an index that `save` wrote.

    keys: the keys the index was built on, (G, S, D), used in place; needed when it was saved without them.
    verified: the caller has compared the file with a checksum of the whole of it, so its arrays are not read again for
        their own.
    Raises FileNotFoundError, or ValueError for a file or keys that do not belong.
    """
    saved = storage.read(path, keys, verified)
    prepare(saved.kind, saved.keys.array.dtype)
    return _kind(saved.kind).restore(saved)


@functools.cache
def prepare(kind: str, dtype: Any) -> None:
    """Compile, or load from disk, all that one kind of index runs on one kind of keys, by using a tiny one.

    Otherwise the first search would, in the middle of a reply.
    """
    require_safe_threads()
    # Enough keys for what is done in parallel, and for searches that do not scan.
    n = 4096
    keys = np.zeros((1, n + 2, 16), dtype)
    keys[0, :, 0] = np.arange(n + 2) % 128
    q = np.ones((1, 16), np.float32)
    index = _kind(kind).build(Keys(keys[:, :n]), q[None], 0, Steps())
    index.search(q, k=1)
    index.search(q, k=1, effort=n)
    index.append(keys[:, n:])
    index.search(q, k=1)


def _kind(kind: str) -> Any:
    if kind not in _KINDS:
        raise ValueError(f"unknown index kind {kind!r}; choose from {', '.join(_KINDS)}")
    return _KINDS[kind]
