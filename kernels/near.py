"""Attention over the window on the device: few keys, every layer, every step."""

import torch
from torch import Tensor

from .merge import AttentionState, attend
from .prefill import attend_dense, check_attention, common_dtype, fold_group, unfold_group


def attend_near(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> AttentionState:
    """Exact attention over a short window of keys.

    query: (B, H, T, D); keys: (B, G, W, D); values: (B, G, W, Dv), on one device; KV head of query head h is h // R.
    mask: bool, broadcastable to (B, H, T, W), True = attend; a row without any True is empty, and so is W = 0.
    Without a mask this is one fused kernel; with one, float32 scores of shape (B, H, T, W) are written out.
    Accumulates in float32; returns `out` in the query's dtype. Never repeats keys for the heads of a group.
    Raises ValueError for shapes that do not fit. Leaves its arguments unchanged; safe from many threads.
    """
    if mask is None:
        return attend_dense(query, keys, values, scale)
    check_attention(query, keys, values)
    _check_mask(mask, query, keys)
    state = attend(_masked_scores(query, keys, scale, mask), values.to(common_dtype(query, keys, values, wide=True)))
    return unfold_group(state, query)


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
    fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"mask must be broadcastable to (B, H, T, W) = {full}, got {tuple(mask.shape)}")
