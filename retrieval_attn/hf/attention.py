"""transformers' attention interface: the function that full-attention layers call, and the masks it wants.

Nothing is patched. `RetrievalLayer.update` returns only the new keys and values and hangs itself on the key tensor; the
attention function, which runs next, finds it there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from retrieval_attn.hf.layer import layer_of
from retrieval_attn.hf.rope import rope_border
from retrieval_attn.hf.versions import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE_ARGUMENT,
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)

NAME = "retrieval"


def register() -> None:
    """Make `attn_implementation="retrieval"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def unregister() -> None:
    """Undo `register`."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), new key and value (B, G, T, D); returns (B, T, H, D).

    Sliding-window layers go to stock sdpa. Raises ValueError where silence would be wrong output: a full-attention
    layer whose cache is not a `RetrievalCache`, keys shared between layers, softcapped logits, learned sinks, masks.
    """
    layer = layer_of(key)
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            "learned attention sinks (gpt-oss) take a share that no key stands for; they are not supported"
        )
    if layer is None:
        if not _is_sliding(module, kwargs):
            raise ValueError(_needs_our_cache(module))
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("softcapped attention logits (Gemma-2) are not inner products and cannot be retrieved")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state = layer.attend(query.detach(), key.detach(), value.detach(), attention_mask, scale)
    return state.out.transpose(1, 2).contiguous(), None


def _needs_our_cache(module: torch.nn.Module) -> str:
    config = getattr(module, "config", None)
    border = rope_border(config) if config is not None else None
    dropped = (
        f" ('generate' of this model drops a cache where a text passes {border} tokens, retrieval_attn.load does not)"
        if border
        else ""
    )
    return (
        f"attention 'retrieval' in layer {getattr(module, 'layer_idx', '?')} needs the cache "
        f"retrieval_attn.RetrievalCache(model.config, config), got another cache or none{dropped}; pass it as "
        f"{CACHE_ARGUMENT}=, or load the model with attn_implementation='sdpa'"
    )


def make_mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """transformers' mask interface: stock masks for sliding layers, else the (B, S) padding mask or None.

    A T x S mask is never made. Without this function registered, left padding would be ignored silently.
    """
    if local_size is not None:
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError("only causal attention with padding is supported; the model asks for a mask of its own on top")
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask


def _is_sliding(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("sliding_window") is not None:
        return True
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return kinds is not None and index is not None and kinds[index] in ("sliding_attention", "chunked_attention")


@contextmanager
def watched_attention(model: Any, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, the full-attention layers of a model call `function`; at the end all is as it was, whatever happened.

    function: as transformers' attention interface, see `attend`; with all keys and values of the cache in use, or of
    this pass if there is none, and with stock masks: None where causality says it all. Sliding-window layers go to
    stock sdpa. Not for a model that another thread uses meanwhile.
    """

    def watched(module: torch.nn.Module, *inputs: Any, **kwargs: Any) -> tuple[Tensor, None]:
        chosen = ALL_ATTENTION_FUNCTIONS["sdpa"] if _is_sliding(module, kwargs) else function
        return chosen(module, *inputs, **kwargs)

    name, before = f"watched-{id(model):x}", model.config._attn_implementation
    AttentionInterface.register(name, watched)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        try:
            model.set_attn_implementation(before)
        finally:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)
