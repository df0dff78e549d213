"""Attention over keys found in CPU memory: gather and attend in one pass, without copying a key.

One task per KV head and query: collect the ids of the head group, score each key once for all its query heads, softmax,
then the values. The rows lie anywhere in hundreds of megabytes, so the time goes into waiting for memory; the rows of
the next keys and the values of this one are asked for ahead of use.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array, as_array, as_stored
from retrieval_attn.compiled import as_float, jit, prefetch
from retrieval_attn.kernels.merge import AttentionState
from retrieval_attn.threads.pool import require_safe_threads

# Keys scored at a time, while the next as many are on their way from memory.
AHEAD = 8

# 2**32 over the golden ratio: spreads neighbouring ids over the table.
HASH = 2654435769


class _Rows(NamedTuple):
    """(G, S, D) as compiled code takes it: one flat array whatever the strides, so there is one compilation a dtype."""

    flat: Array
    group_stride: int
    row_stride: int


class _Asked(NamedTuple):
    """What is read: ids (H, T, K), scores from limits (H, T) on; those below are raised to it, or dropped."""

    ids: Array
    limits: Array
    raises: bool


# What becomes of a score below the threshold of its query.
BELOW = ("drop", "raise")


def attend_far(
    query: Tensor,
    keys: Any,
    values: Any,
    ids: Any,
    scale: float,
    *,
    share_group: bool = True,
    threshold: Any = None,
    below: str = "drop",
) -> AttentionState:
    """Exact attention of one sequence over the keys named by `ids`.

    query: (1, H, T, D) or (H, T, D) tensor in CPU memory.
    keys: (G, S, D); values: (G, S, Dv); CPU tensors or NumPy arrays of float32, float16, bfloat16 or int8 (plain
    numbers), each of its own dtype, never converted as a whole; any strides between rows, each row contiguous. KV head
    of query head h is h // R.
    ids: (H, T, K) int32, -1 where there is none; an id named twice counts once.
    share_group: True lets each query head attend to everything its head group found, which reads each key once and
    recovers more mass; False lets it attend to its own ids only.
    threshold: (H, T) float32 or None: keys whose scaled score is below are left out (below="drop", for estimators that
    account for them otherwise) or count as if they scored that much (below="raise", the weights of a priority sample).
    Returns out (1, H, T, Dv) in the query's dtype, accumulated in float32, and lse (1, H, T); a head without ids is
    empty. Raises ValueError for shapes that do not fit, ids outside -1 .. S - 1, and NaN or infinity in the scores.
    Leaves its arguments unchanged; safe from many threads.
    """
    require_safe_threads()
    query = query if query.ndim == 4 else query[None]
    key_array, value_array, found = as_array(keys, "keys"), as_array(values, "values"), as_array(ids, "ids")
    _check(query, key_array, value_array, found)
    _, H, T, _ = query.shape
    R = H // key_array.shape[0]
    wide = as_array(query.float(), "query")[0]
    limits = _limits(threshold, below, H, T)
    out = np.empty((H, T, value_array.shape[2]), np.float32)
    lse = np.empty((H, T), np.float32)
    rows = _rows(key_array, "keys"), _rows(value_array, "values")
    asked = _Asked(np.require(found, requirements=["C", "W"]), limits, below == "raise")
    share = R if share_group else 1
    _attend(np.ascontiguousarray(wide), *rows, asked, R, share, np.float32(scale), out, lse)
    _raise_if_nan(lse, wide)
    return AttentionState(torch.from_numpy(out)[None].to(query.dtype), torch.from_numpy(lse)[None])


def _check(query: Tensor, keys: Array, values: Array, ids: Array) -> None:
    if query.ndim != 4 or query.shape[0] != 1 or not keys.ndim == values.ndim == ids.ndim == 3:
        problem = "must be"
    elif keys.shape[:2] != values.shape[:2] or keys.shape[2] != query.shape[3] or ids.shape[:2] != query.shape[1:3]:
        problem = "must agree as"
    elif keys.shape[0] == 0 or query.shape[1] % keys.shape[0]:
        problem = "must have heads H a multiple of G in"
    else:
        problem = None
    if problem:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, keys, values, ids))
        wanted = "(1, H, T, D), (G, S, D), (G, S, Dv), (H, T, K)"
        raise ValueError(f"query, keys, values and ids {problem} {wanted}, got {shapes}")
    if ids.dtype != np.int32:
        raise ValueError(f"ids must be int32, got {ids.dtype}")
    if ids.size and (ids.min() < -1 or ids.max() >= keys.shape[1]):
        bad = ids[(ids < -1) | (ids >= keys.shape[1])][0]
        raise ValueError(f"ids must be between -1 (none) and {keys.shape[1] - 1} (the last key), got {bad}")


def _limits(threshold: Any, below: str, H: int, T: int) -> Array:
    """The thresholds (H, T) float32; -inf, which changes nothing, where none are given."""
    if below not in BELOW:
        raise ValueError(f"below must be one of {', '.join(BELOW)}, got {below!r}")
    if threshold is None:
        return np.full((H, T), -np.inf, np.float32)
    limits = np.ascontiguousarray(as_array(threshold, "threshold"), np.float32)
    if limits.shape != (H, T) or np.isnan(limits).any():
        raise ValueError(f"threshold must be {(H, T)} (query heads, queries) without NaN, got shape {limits.shape}")
    return limits


def _rows(x: Array, name: str) -> _Rows:
    x = as_stored(x)
    if x.flags.c_contiguous:
        return _Rows(x.reshape(-1), x.shape[1] * x.shape[2], x.shape[2])
    if x.strides[2] != x.itemsize or min(x.strides) < 0 or any(step % x.itemsize for step in x.strides):
        raise ValueError(f"each row of {name} must be contiguous, rows in rising order, got strides {x.strides} bytes")
    steps = [step // x.itemsize for step in x.strides]
    extent = 1 + sum(step * (n - 1) for step, n in zip(steps, x.shape, strict=True)) if x.size else 0
    return _Rows(np.lib.stride_tricks.as_strided(x, (extent,), (x.itemsize,)), steps[0], steps[1])


def _raise_if_nan(lse: Array, query: Array) -> None:
    if not np.isnan(lse).any():
        return
    head = int(np.argwhere(np.isnan(lse))[0, 0])
    if np.isnan(query[head]).any():
        raise ValueError(f"query holds NaN in head {head}")
    raise ValueError(f"the scores of head {head} hold NaN or infinity: look for them in its query, its keys and scale")


# A parallel function is compiled several times over, with all that it calls, so it does nothing but hand out tasks.
@jit(parallel=True)
def _attend(
    query: Array, keys: _Rows, values: _Rows, asked: _Asked, R: int, share: int, scale: float, out: Array, lse: Array
) -> None:
    """query (H, T, D) -> out (H, T, Dv), lse (H, T); `share` heads go together: R, or 1."""
    H, T = lse.shape
    for task in numba.prange(H // share * T):
        _attend_group(query, keys, values, asked, R, task // T * share, share, task % T, scale, out, lse)


@jit()
def _attend_group(
    query: Array,
    keys: _Rows,
    values: _Rows,
    asked: _Asked,
    R: int,
    first: int,
    share: int,
    t: int,
    scale: float,
    out: Array,
    lse: Array,
) -> None:
    """Query t of the heads from `first` on."""
    ids, limits, raises = asked
    heads = slice(first, first + share)
    found = np.empty(share * ids.shape[2], np.int64)
    n = _union(ids[heads, t], found)
    key_at = _places(found, n, keys.row_stride, first // R * keys.group_stride)
    value_at = _places(found, n, values.row_stride, first // R * values.group_stride)
    weights = np.empty((n, share), np.float32)
    _score(query[heads, t] * scale, keys.flat, key_at, values.flat, value_at, out.shape[2], weights)
    _cut(weights, limits[heads, t], raises)
    _softmax(weights, lse[heads, t])
    # Contiguous, whatever the strides of `out`: loops over it vectorise.
    total = np.zeros((share, out.shape[2]), np.float32)
    _add_values(weights, values.flat, value_at, total)
    out[heads, t] = total


@jit()
def _places(found: Array, n: int, stride: int, start: int) -> Array:
    """Where the rows of the first n of `found` begin."""
    places = np.empty(n, np.int64)
    for i in range(n):
        places[i] = found[i] * stride + start
    return places


@jit()
def _union(ids: Array, found: Array) -> int:
    """Write the distinct ids of (share, K) to `found`, in order of appearance; returns how many there are."""
    size = 16
    while size < 2 * found.size:
        size *= 2
    table = np.full(size, -1, np.int32)
    n = 0
    for r in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            x = ids[r, j]
            if x < 0:
                continue
            slot = (np.int64(x) * HASH >> 16) & (size - 1)
            while table[slot] != -1 and table[slot] != x:
                slot = (slot + 1) & (size - 1)
            if table[slot] == -1:
                table[slot] = x
                found[n] = x
                n += 1
    return n


@jit()
def _score(query: Array, keys: Array, key_at: Array, values: Array, value_at: Array, Dv: int, scores: Array) -> None:
    """query (share, D), scaled; scores (n, share)."""
    share, D = query.shape
    n = key_at.size
    _ask(keys, key_at[:AHEAD], D)
    for start in range(0, n, AHEAD):
        block = slice(start, min(start + AHEAD, n))
        _ask(keys, key_at[block.stop : block.stop + AHEAD], D)
        _ask(values, value_at[block], Dv)
        r = 0
        while r + 4 <= share:
            _score4(query[r : r + 4], keys, key_at[block], scores[block, r : r + 4])
            r += 4
        while r < share:
            _score1(query[r], keys, key_at[block], scores[block, r])
            r += 1


@jit()
def _ask(rows: Array, row_at: Array, dim: int) -> None:
    for i in range(row_at.size):
        prefetch(rows, row_at[i], dim)


# The loops below index with unsigned numbers: signed ones might count from the end, and testing for it stops
# vectorisation. Slices are taken outside of loops: each costs two atomic reference counts.


@jit()
def _score4(query: Array, keys: Array, key_at: Array, scores: Array) -> None:
    """Four queries at once: each element of a key is read and widened once."""
    q0, q1, q2, q3 = query[0], query[1], query[2], query[3]
    for i in range(key_at.size):
        at = np.uint64(key_at[i])
        s0 = s1 = s2 = s3 = np.float32(0)
        for d in range(q0.size):
            k = as_float(keys[at + np.uint64(d)])
            s0 += q0[d] * k
            s1 += q1[d] * k
            s2 += q2[d] * k
            s3 += q3[d] * k
        scores[i, 0], scores[i, 1], scores[i, 2], scores[i, 3] = s0, s1, s2, s3


@jit()
def _score1(query: Array, keys: Array, key_at: Array, scores: Array) -> None:
    for i in range(key_at.size):
        at = np.uint64(key_at[i])
        total = np.float32(0)
        for d in range(query.size):
            total += query[d] * as_float(keys[at + np.uint64(d)])
        scores[i] = total


@jit()
def _cut(scores: Array, limits: Array, raises: bool) -> None:
    """What is below its head's limit is raised to it, or else dropped; NaN stays."""
    for r in range(scores.shape[1]):
        limit = limits[r]
        if limit > -np.inf:
            for i in range(scores.shape[0]):
                if scores[i, r] < limit:
                    scores[i, r] = limit if raises else np.float32(-np.inf)


@jit()
def _softmax(scores: Array, lse: Array) -> None:
    """scores (n, share) become weights in place; lse (share,)."""
    n, share = scores.shape
    for r in range(share):
        top = np.float32(-np.inf)
        for i in range(n):
            top = max(top, scores[i, r])
        total = np.float32(0)
        # Of a head whose keys were all dropped, nothing is left: weights of zero.
        base = top if top > -np.inf else np.float32(0)
        for i in range(n):
            weight = math.exp(scores[i, r] - base)
            scores[i, r] = weight
            total += weight
        lse[r] = base + math.log(total)
        if total > 0:
            for i in range(n):
                scores[i, r] /= total


@jit()
def _add_values(weights: Array, values: Array, value_at: Array, total: Array) -> None:
    """total (share, Dv) += weights (n, share) of the values."""
    share = total.shape[0]
    r = 0
    while r + 4 <= share:
        _add4(weights[:, r : r + 4], values, value_at, total[r : r + 4])
        r += 4
    while r < share:
        _add1(weights[:, r], values, value_at, total[r])
        r += 1


@jit()
def _add4(weights: Array, values: Array, value_at: Array, total: Array) -> None:
    """Two values to four heads at once; a last odd value is paired with itself, at weight zero."""
    t0, t1, t2, t3 = total[0], total[1], total[2], total[3]
    for i in range(0, value_at.size, 2):
        j = min(i + 1, value_at.size - 1)
        x_at, y_at = np.uint64(value_at[i]), np.uint64(value_at[j])
        x0, x1, x2, x3 = weights[i, 0], weights[i, 1], weights[i, 2], weights[i, 3]
        y0, y1, y2, y3 = weights[j, 0], weights[j, 1], weights[j, 2], weights[j, 3]
        if i == j:
            y0 = y1 = y2 = y3 = np.float32(0)
        for d in range(t0.size):
            x = as_float(values[x_at + np.uint64(d)])
            y = as_float(values[y_at + np.uint64(d)])
            t0[d] += x0 * x + y0 * y
            t1[d] += x1 * x + y1 * y
            t2[d] += x2 * x + y2 * y
            t3[d] += x3 * x + y3 * y


@jit()
def _add1(weights: Array, values: Array, value_at: Array, total: Array) -> None:
    for i in range(0, value_at.size, 2):
        j = min(i + 1, value_at.size - 1)
        x_at, y_at = np.uint64(value_at[i]), np.uint64(value_at[j])
        w, u = weights[i], weights[j] if i < j else np.float32(0)
        for d in range(total.size):
            total[d] += w * as_float(values[x_at + np.uint64(d)]) + u * as_float(values[y_at + np.uint64(d)])
