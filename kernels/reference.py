"""What the kernels compute, in plain PyTorch and float32: slow, short, and the definition.

Same names and signatures as the fast ones. Inputs in float64 are computed in float64, which makes this the yardstick
for the rounding of float32 as well.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.kernels.merge import AttentionState, attend
from retrieval_attn.kernels.sparse.lists import SparseIndex

__all__ = ["attend_dense", "attend_far", "attend_near", "attend_sparse", "listed_keys", "merge"]


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


def attend_sparse(query: Tensor, keys: Tensor, values: Tensor, scale: float, index: SparseIndex) -> AttentionState:
    """Softmax attention under a mask with True where `index` lists a key that does not come after the query."""
    T, S = query.shape[2], keys.shape[2]
    position = torch.arange(S - T, S, device=query.device)
    causal = torch.arange(S, device=query.device) <= position[:, None]
    listed = listed_keys(index, S).repeat_interleave(index.rows, dim=2)[:, :, :T]
    return attend_near(query, keys, values, scale, listed & causal)


def listed_keys(index: SparseIndex, n_keys: int) -> Tensor:
    """(B, H, N, S) bool: which keys are listed for each run of queries."""
    device = index.blocks.device
    listed = torch.zeros((*index.n_blocks.shape, n_keys), dtype=torch.bool, device=device)
    within = torch.arange(index.width, device=device)
    for run in itertools.product(*map(range, index.n_blocks.shape)):
        starts = index.blocks[run][: index.n_blocks[run]]
        columns = index.columns[run][: index.n_columns[run]]
        keys = torch.cat([(starts[:, None] + within).flatten(), columns])
        listed[run][keys[(keys >= 0) & (keys < n_keys)].long()] = True
    return listed


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
