"""Queries that taught no index, and exact attention for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory

# Bytes of scores held at a time.
_BLOCK_BYTES = 1 << 28


class Held(NamedTuple):
    """Queries of one layer that taught no index, (H, N, D) in the model's dtype, and exact float32 attention over the
    context's tokens: out (H, N, Dv), lse (H, N); best, mean: (H, N), largest and mean inner product with a key."""

    queries: Tensor
    out: Tensor
    lse: Tensor
    best: Tensor
    mean: Tensor

    @classmethod
    def of(cls, queries: Tensor, memory: LayerMemory) -> "Held":
        """memory: of the context."""
        keys, values = memory.store.read(0, memory.length)
        R, n_rows = len(queries) // len(keys), 1 + _BLOCK_BYTES // (4 * memory.length)
        heads = []
        for h, rows in enumerate(queries):
            head = keys[h // R].float(), values[h // R].float()
            blocks = [_exact(block.float(), *head, memory.scale) for block in rows.split(n_rows)]
            heads.append([torch.cat(x) for x in zip(*blocks, strict=True)])
        return cls(queries, *(torch.stack(x) for x in zip(*heads, strict=True)))


def _exact(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, ...]:
    scores = queries @ keys.T
    best, mean = scores.amax(1), scores.mean(1)
    scores *= scale
    lse = scores.logsumexp(1)
    return (scores - lse[:, None]).exp() @ values, lse, best, mean
