"""What the kernels compute, in plain PyTorch and float32: slow, short, and the definition.

Same names and signatures as the fast ones. Inputs in float64 are computed in float64, which makes this the yardstick
for the rounding of float32 as well.
"""

from typing import Any

import torch
from torch import Tensor

from retrieval_attn.host import Array

from .merge import AttentionState, attend

__all__ = ["attend_dense", "attend_far", "attend_near", "merge"]


def merge(first: AttentionState, *others: AttentionState) -> AttentionState:
    """Attention over the union of disjoint subsets: outputs weighted by their softmax denominators."""
    states = (first, *others)
    lse = torch.stack([_wide(state.lse) for state in states])
    out = torch.stack([_wide(state.out) for state in states])
    total = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - total).nan_to_num(0.0)
    return AttentionState((weights[..., None] * out).sum(0).to(first.out.dtype), total)


def attend_near(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> AttentionState:
    """Softmax attention over a window; mask: bool, broadcastable to (B, H, T, W), True = attend."""
    R = query.shape[1] // keys.shape[1]
    keys, values = (_wide(x).repeat_interleave(R, dim=1) for x in (keys, values))
    scores = _wide(query) @ keys.mT * scale  # [B, H, T, W]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return AttentionState((weights @ values).to(query.dtype), lse)


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool = False) -> AttentionState:
    """Softmax attention; if causal, query t sees keys 0 .. S - T + t."""
    T, S = query.shape[2], keys.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T) if causal else None
    return attend_near(query, keys, values, scale, mask)


def attend_far(
    query: Tensor,
    keys: Any,
    values: Any,
    ids: Array,
    scale: float,
    *,
    share_group: bool = True,
    threshold: Any = None,
    below: str = "drop",
) -> AttentionState:
    """Softmax attention of one sequence over chosen keys: a mask with True at the ids of the head, or of its group."""
    query = query if query.ndim == 4 else query[None]
    keys, values, found = (torch.as_tensor(x) for x in (keys, values, ids))
    H, T, S = query.shape[1], query.shape[2], keys.shape[1]
    mask = torch.zeros(H, T, S + 1, dtype=torch.bool)
    mask.scatter_(2, found.long().where(found >= 0, S), True)
    if share_group:
        R = H // keys.shape[0]
        mask = mask.view(-1, R, T, S + 1).any(1).repeat_interleave(R, dim=0)
    mask = mask[None, :, :, :S]
    if threshold is None:
        return attend_near(query, keys[None], values[None], scale, mask)
    limits = torch.as_tensor(threshold)[None, :, :, None]
    R = H // keys.shape[0]
    keys, values = (_wide(x).repeat_interleave(R, dim=0)[None] for x in (keys, values))
    scores = _wide(query) @ keys.mT * scale
    if below == "raise":
        scores = torch.maximum(scores, limits)
    else:
        mask = mask & (scores >= limits)
    return attend(scores.masked_fill(~mask, -torch.inf), values)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
