"""Attention as it is defined, and how far an output is from it."""

import torch
from torch import Tensor


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The definition, in float32 on the CPU: query (1, H, 1, D), keys (G, S, D), chosen (H, S) bool; gives (H, Dv)."""
    H, G = query.shape[1], len(keys)
    wide = query[0, :, 0].float().cpu().view(G, H // G, -1)
    out = []
    for g in range(G):
        scores = wide[g] @ keys[g].float().T * query.shape[-1] ** -0.5
        if chosen is not None:
            scores = scores.masked_fill(~chosen.view(G, H // G, -1)[g], -torch.inf)
        out.append(scores.softmax(-1) @ values[g].float())
    return torch.cat(out)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((found - wanted).norm() / wanted.norm())
