"""How hard each method is made to look, step by step, and the bytes that a search then reads."""

from typing import Any

from retrieval_attn.bench.methods.faiss_rivals import LINKS
from retrieval_attn.bench.vectors.sources import Vectors
from retrieval_attn.index.graph.search import N_FIRST, N_PROBED
from retrieval_attn.index.ivf import default_lists

# Of the graph, by default.
KEYS_PER_LEAF = 2

Ladder = tuple[int | None, ...]


def ladder(method: str, k: int, index: Any) -> Ladder:
    """Efforts from little to much, in the method's own unit; (None,), its default, for methods without one.

    Those that count keys go in multiples of k; those that count parts, in shares of what there is.
    """
    if method in ("graph", "hnsw"):
        return tuple(k * n for n in ((1, 2, 4, 8, 16) if method == "graph" else (1, 2, 4, 8, 16, 32)))
    if method == "scan":
        return tuple(k * n for n in (1, 2, 4, 8, 16))
    if method == "page":
        return _shares(index.n_keys, (2048, 1024, 512, 256, 128, 64))
    if method in ("ivf", "faiss-ivf"):
        n_lists = index.n_lists if method == "faiss-ivf" else default_lists(index.n_keys)
        return _shares(n_lists, (64, 32, 16, 8, 4, 2))
    return (None,)


def bytes_read(method: str, index: Any, vectors: Vectors, visited: float, effort: int | None, k: int) -> float:
    """An estimate of what one call reads, all heads together, from what it visits; the rule is in `RULE`."""
    G, S, D = vectors.keys.shape
    H, key = len(vectors.queries), D * vectors.keys.element_size()
    wide = 4 * D
    if method == "exact":
        return float(G * S * key)
    if method == "scan":
        return float(index.nbytes + H * (effort or k) * key)
    if method == "page":
        return float(index.nbytes + H * visited * key)
    if method == "graph":
        return float(H * (visited * key + (effort or k) * index.nbytes / (G * S) + leaf_bytes(S, D, effort or k, k)))
    if method == "hnsw":
        return float(H * (visited * wide + (effort or k) * 8 * LINKS))
    if method in ("ivf", "faiss-ivf"):
        return float(G * default_lists(S) * wide + H * visited * wide + (H * k * key if method == "ivf" else 0))
    return float(H * visited * key)


RULE = (
    "bytes read are an estimate: visited keys, per query head, times the bytes of a key as the method keeps it (faiss: "
    "float32); exact reads each key once for its group, scan and page their whole index once and then keys, graph and "
    "hnsw the links of as many keys as the beam is wide, graph also the int8 means of pairs of keys that it compares "
    "first, which are not among the visited keys, ivf all centroids; heads of a group may in truth share reads"
)


def leaf_bytes(S: int, D: int, effort: int, k: int) -> float:
    """Bytes of the leaves' means, a byte a dimension, that a search of the graph compares for one query."""
    return min(S, N_FIRST * N_PROBED * max(effort, k)) / KEYS_PER_LEAF * D


def _shares(n: int, parts: tuple[int, ...]) -> Ladder:
    return tuple(dict.fromkeys(max(1, n // part) for part in parts))
