"""What retrieval is compared with: the attention of stock transformers, and the same with the head group folded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrieval_attn.hf.versions import AttentionMaskInterface, sdpa_mask

# transformers refuses names that contain "sdpa".
FOLDED = "folded"


class _Layer(torch.nn.Module):
    """What transformers' attention function asks of the layer it serves."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def full(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Stock transformers, one decode step of one layer: query (1, H, 1, D), keys (1, G, S, D); returns (1, H, 1, D)."""
    layer = _Layer(query.shape[1] // keys.shape[1])
    out, _ = sdpa_attention_forward(layer, query, keys, values, None, scaling=query.shape[-1] ** -0.5)
    return out.transpose(1, 2)


def folded(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `full`, with the R heads of a group as R queries of one head, so that each key is read once."""
    B, H, _, D = query.shape
    G = keys.shape[1]
    out = scaled_dot_product_attention(query.reshape(B, G, H // G, D), keys, values, scale=D**-0.5)
    return out.reshape(B, H, 1, values.shape[-1])


FUNCTIONS = {"full": full, "folded": folded}


@contextmanager
def folded_registered() -> Iterator[str]:
    """Inside, transformers knows the attention implementation whose name this yields."""
    AttentionInterface.register(FOLDED, _folded_attention)
    AttentionMaskInterface.register(FOLDED, sdpa_mask)
    try:
        yield FOLDED
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(FOLDED, None)


def _folded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: folds single tokens, leaves everything else to stock sdpa; also layers with a
    window, whatever it holds."""
    if query.shape[2] != 1 or attention_mask is not None or kwargs.get("sliding_window") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    B, H, _, D = query.shape
    scale = kwargs.get("scaling") or D**-0.5
    out = scaled_dot_product_attention(query.reshape(B, key.shape[1], -1, D), key, value, scale=scale)
    return out.reshape(B, 1, H, value.shape[-1]), None
