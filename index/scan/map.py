"""Coordinates in which few numbers tell most about the scores of the queries that a head asks.

A query's score changes by <q, error> when a key is stored with an error. Over the queries of a sample with second
moment C, its mean square is |C^(1/2) error|^2: what counts is the error after mapping keys with A = C^(1/2). So keys
are centred and mapped with A, queries with its inverse, which leaves every inner product as it is up to a constant
per query. The directions in which the mapped keys vary most are kept, and rotated at random among each other, so that
all coordinates vary alike and one step size suits them all.
"""

from typing import NamedTuple

import numpy as np

from retrieval_attn.arrays import Array, as_float32
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.scan.dots import GROUP_DIMS

# Share of the mapped keys' variance that the kept directions must hold. More of them cost bytes for every key, fewer
# cost more candidates to find as much: from 0.9 to 0.98 the time at equal recall is about the same, and queries unlike
# the sample are served better by more.
KEPT = 0.95

# Queries to come differ from the sample: as if so many, for each one in it, came from all directions alike.
UNSEEN = 1.0

# Keys per head that the map is made from, evenly spread.
SAMPLE = 16384

# One enormous key should not decide where the middle is and which directions are kept: none counts for more than this
# many times the middle length.
LONGEST = 4.0


class Map(NamedTuple):
    """Coordinates of m dimensions, m a multiple of 8 (zeros fill up), for each KV head.

    keys: (G, m, D) float32; the coordinates of key k of head g are keys[g] @ k - offsets[g].
    offsets: (G, m) float32, the coordinates of the mean key.
    queries: (G, m, D) float32; queries[g] @ q are those of query q.
    """

    keys: Array
    offsets: Array
    queries: Array


def fit(keys: Keys, queries: Array | None, seed: int, dims: int | None) -> Map:
    """The map of a layer from its keys and a sample of its queries (H, T, D), or None: all directions alike.

    dims: directions to keep; None: as many as hold KEPT of the variance in every head.
    """
    n_heads, _, dim = keys.shape
    rng = np.random.default_rng(seed)
    samples = [_sample(keys, head) for head in range(n_heads)]
    means = np.stack([_shortened(sample).mean(axis=0) for sample in samples])
    asked = [None] * n_heads if queries is None else queries.reshape(n_heads, -1, dim)
    heads = [_directions(_shortened(sample - mean), q) for sample, mean, q in zip(samples, means, asked, strict=True)]
    wanted = max(_enough(shares) for _, _, shares in heads) if dims is None else dims
    n_padded = -(-min(wanted, dim) // GROUP_DIMS) * GROUP_DIMS
    n_kept = min(n_padded if dims is None else dims, dim)
    key_maps, query_maps = np.zeros((2, n_heads, n_padded, dim), np.float32)
    for head, (for_keys, for_queries, _) in enumerate(heads):
        turn = np.linalg.qr(rng.standard_normal((n_kept, n_kept)))[0]
        key_maps[head, :n_kept] = turn @ for_keys[:n_kept]
        query_maps[head, :n_kept] = turn @ for_queries[:n_kept]
    return Map(key_maps, np.einsum("gmd,gd->gm", key_maps, means).astype(np.float32), query_maps)


def _sample(keys: Keys, head: int) -> Array:
    """(n, D) float64 of up to SAMPLE keys."""
    n_keys = keys.shape[1]
    rows = np.linspace(0, n_keys - 1, min(n_keys, SAMPLE)).astype(np.int64)
    return as_float32(keys.array[head, rows]).astype(np.float64)


def _directions(centred: Array, queries: Array | None) -> tuple[Array, Array, Array]:
    """Rows that map keys, rows that map queries, (D, D) both, and their shares of the variance, largest first."""
    covariance = centred.T @ centred / len(centred)
    if queries is None:
        to, back = np.eye(len(covariance)), np.eye(len(covariance))
    else:
        to, back = _roots(_second_moment(queries.astype(np.float64), covariance))
    variances, axes = np.linalg.eigh(to @ covariance @ to)
    variances, axes = np.maximum(variances[::-1], 0.0), axes[:, ::-1]
    total = variances.sum()
    shares = variances / total if total > 0 else np.full(len(variances), 1 / len(variances))
    return axes.T @ to, axes.T @ back, shares


def _shortened(rows: Array) -> Array:
    """The rows, those that are longer than LONGEST middle lengths cut to that."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    longest = LONGEST * np.median(lengths)
    return rows * (longest / np.maximum(lengths, longest)) if longest > 0 else rows


def _second_moment(queries: Array, covariance: Array) -> Array:
    """Of the queries (n, D), each scaled to the same spread of scores: only their order matters."""
    spread = np.sqrt(np.maximum(np.einsum("nd,de,ne->n", queries, covariance, queries, optimize=True), 0.0))
    scaled = queries / np.where(spread > 0, spread, np.inf)[:, None]
    return scaled.T @ scaled


def _roots(moment: Array) -> tuple[Array, Array]:
    """Square root of a second moment and its inverse, in units of the mean."""
    values, axes = np.linalg.eigh(moment)
    mean = values.mean()
    values = np.maximum(values, 0.0) / mean + UNSEEN if mean > 0 else np.ones(len(values))
    return (axes * values**0.5) @ axes.T, (axes * values**-0.5) @ axes.T


def _enough(shares: Array) -> int:
    """How many of the first directions hold KEPT of the variance."""
    return min(int(np.searchsorted(np.cumsum(shares), KEPT)) + 1, len(shares))
