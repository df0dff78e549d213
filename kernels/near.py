"""Attention over the window on the device: few keys, every layer, every step."""

import functools
import logging

import torch
from torch import Tensor

from retrieval_attn.kernels.dense import attend_dense, check_attention, common_dtype, fold_group, unfold_group
from retrieval_attn.kernels.merge import AttentionState, attend, has_triton
from retrieval_attn.kernels.sparse.lists import DTYPES, HEAD_DIMS

log = logging.getLogger("retrieval_attn")

# Queries times heads of a group up to which the Triton kernel, made for steps of decoding, reads the window.
MOST_ROWS = 128

# Queries whose scores `attend_window` writes out at once.
WINDOW_ROWS = 256


def attend_near(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> AttentionState:
    """Exact attention over a short window of keys.

    query: (B, H, T, D); keys: (B, G, W, D); values: (B, G, W, Dv), on one device; KV head of query head h is h // R.
    mask: bool, broadcastable to (B, H, T, W), True = attend; a row without any True is empty, and so is W = 0.
    On a GPU this is one launch for R * T <= 128, with or without a mask, if all are of one dtype, float16, bfloat16 or
    float32, and D = Dv is 64, 96, 128 or 256. Else it is one fused kernel without a mask; with one, float32 scores of
    shape (B, H, T, W) are written out.
    Accumulates in float32; returns `out` in the query's dtype. Never repeats keys for the heads of a group.
    Raises ValueError for shapes that do not fit. Leaves its arguments unchanged; safe from many threads.
    """
    if mask is None and query.device.type != "cuda":
        return attend_dense(query, keys, values, scale)
    check_attention(query, keys, values)
    if mask is not None:
        _check_mask(mask, query, keys)
    if query.device.type == "cuda" and _is_one_launch(query, keys, values):
        from retrieval_attn.kernels.gpu.near import attend_near as launch

        return AttentionState(*launch(query, keys, values, scale, mask))
    if mask is None:
        return attend_dense(query, keys, values, scale)
    state = attend(_masked_scores(query, keys, scale, mask), values.to(common_dtype(query, keys, values, wide=True)))
    return unfold_group(state, query)


def attend_window(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, mask: Tensor | None = None
) -> AttentionState:
    """Exact causal attention of the last T tokens over the last `window` tokens before each, itself included.

    query: (B, H, T, D), of the last T of the S keys (B, G, S, D) and values (B, G, S, Dv). mask: bool (B, 1, T, S), in
    the place of causality and window, beyond which it may not reach; True = attend. Scores are written out for a block
    of queries at a time, and for no more keys than it can see. window >= 1. For layers with learned sinks, which sdpa
    leaves out: they are merged by the `lse`.
    """
    T, S = query.shape[2], keys.shape[2]
    parts = [AttentionState.empty((*query.shape[:2], 0, values.shape[3]), query.dtype, query.device)]
    for start in range(0, T, WINDOW_ROWS):
        stop = min(start + WINDOW_ROWS, T)
        first, last = max(0, S - T + start - window + 1), S - T + stop
        part = query[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last]
        if mask is None:
            at = torch.arange(S - T + start, last, device=query.device)[:, None]
            before = at - torch.arange(first, last, device=query.device)
            seen = (before >= 0) & (before < window)
        else:
            seen = mask[:, :, start:stop, first:last]
        parts.append(attend_near(*part, scale, seen))
    return AttentionState.beside(parts, dim=2)


def _is_one_launch(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    rows = query.shape[1] // keys.shape[1] * query.shape[2]
    if rows > MOST_ROWS or not query.numel() or not keys.numel():
        return False
    dtypes = (query.dtype, keys.dtype, values.dtype)
    return _has_kernel(query.device, dtypes, (query.shape[3], values.shape[3]))


@functools.cache
def _has_kernel(device: torch.device, dtypes: tuple[torch.dtype, ...], dims: tuple[int, int]) -> bool:
    """Whether the Triton kernel takes such inputs; the cache makes it speak once per case."""
    if not has_triton(device):
        return False
    if dims[0] == dims[1] and dims[0] in HEAD_DIMS and dtypes[0] in DTYPES and len(set(dtypes)) == 1:
        return True
    wanted = f"one dtype, float16, bfloat16 or float32, and one dimension of {', '.join(map(str, HEAD_DIMS))}"
    found = f"{', '.join(map(str, dtypes))} of dimension {dims[0]} and {dims[1]}"
    log.warning("attention near runs without its kernel, which is slower: that wants %s, got %s", wanted, found)
    return False


def _masked_scores(query: Tensor, keys: Tensor, scale: float, mask: Tensor) -> Tensor:
    wide = common_dtype(query, keys, wide=True)
    B, G, W, _ = keys.shape
    folded = fold_group(query, G).to(wide) * scale
    scores = folded @ keys.to(wide).mT  # [B, G, R * T, W]
    per_head = scores.view(B, query.shape[1], query.shape[2], W)
    per_head.masked_fill_(~mask, -torch.inf)
    return scores


def _check_mask(mask: Tensor, query: Tensor, keys: Tensor) -> None:
    full = (*query.shape[:3], keys.shape[2])
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = attend), got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"mask and query must be on one device, got {mask.device} and {query.device}")
    fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"mask must be broadcastable to (B, H, T, W) = {full}, got {tuple(mask.shape)}")
