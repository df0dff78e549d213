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
from retrieval_attn.hf.layers import is_wide
from retrieval_attn.hf.rope import rope_border
from retrieval_attn.hf.versions import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE_ARGUMENT,
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)
from retrieval_attn.kernels import AttentionState, attend_window

NAME = "retrieval"

# Kinds of layers that attend to a part of the tokens, and how their configs call its length.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


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

    Sliding-window layers go to stock sdpa, or, with learned sinks, to `attend_window`. Sinks (`s_aux`, as of gpt-oss)
    are one more key per head. Raises ValueError where silence would be wrong output: a full-attention layer whose cache
    is not a `RetrievalCache`, keys shared between layers, softcapped logits, masks.
    """
    layer = layer_of(key)
    if layer is None:
        if not _is_sliding(module, kwargs):
            raise ValueError(_needs_our_cache(module))
        return _attend_sliding(module, query, key, value, attention_mask, scaling, dropout=dropout, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("softcapped attention logits (Gemma-2) are not inner products and cannot be retrieved")
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention logits with a bias for distance (Inkling) are not inner products to retrieve by")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state = layer.attend(query.detach(), key.detach(), value.detach(), attention_mask, scale)
    return _as_output(state, kwargs.get("s_aux")), None


def _attend_sliding(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer of stock keys and values. transformers' sdpa leaves learned sinks out, without a word."""
    sinks, window = kwargs.get("s_aux"), kwargs.get("sliding_window")
    if sinks is None:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if window is None:
        where = getattr(module, "layer_idx", "?")
        raise ValueError(f"layer {where} has learned sinks, and a window that it does not tell")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state = attend_window(query.detach(), key.detach(), value.detach(), scale, window, attention_mask)
    return _as_output(state, sinks), None


def _as_output(state: AttentionState, sinks: Tensor | None) -> Tensor:
    """(B, T, H, D), as transformers wants it."""
    state = state if sinks is None else state.with_sinks(sinks)
    return state.out.transpose(1, 2).contiguous()


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
    """transformers' mask interface: stock masks for sliding layers, else the (B, S) padding mask or None. A window that
    no text fills is none.

    A T x S mask is never made. Without this function registered, left padding would be ignored silently.
    """
    if local_size is not None and not is_wide(local_size, kwargs["config"]):
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
    if local_size is None and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError("only causal attention with padding is supported; the model asks for a mask of its own on top")
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask


def _is_sliding(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    config, window = getattr(module, "config", None), kwargs.get("sliding_window")
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if window is None:
        if kinds is None or index is None or kinds[index] not in _WINDOWS:
            return False
        window = getattr(config, _WINDOWS[kinds[index]], None)
    return config is None or window is None or not is_wide(window, config)


@contextmanager
def watched_attention(
    model: Any, function: Callable[..., tuple[Tensor, None]], takes_sinks: bool = False
) -> Iterator[None]:
    """Inside, the full-attention layers of a model call `function`; at the end all is as it was, whatever happened.

    function: as transformers' attention interface, see `attend`; with all keys and values of the cache in use, or of
    this pass if there is none, and with stock masks: None where causality says it all. Sliding-window layers go to
    stock sdpa. takes_sinks: `function` minds `s_aux`; else layers with learned sinks raise ValueError. Not for a model
    that another thread uses meanwhile.
    """

    def watched(module: torch.nn.Module, *inputs: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if _is_sliding(module, kwargs):
            return _attend_sliding(module, *inputs, **kwargs)
        if kwargs.get("s_aux") is not None and not takes_sinks:
            raise ValueError("this model has learned attention sinks (as gpt-oss), without which attention is another")
        return function(module, *inputs, **kwargs)

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
