"""Which layers of a model are ours: those that attend to all tokens before them."""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from retrieval_attn.hf.versions import LinearAttentionAndFullAttentionLayer


def stock_layers(model_config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a model."""
    return list(DynamicCache(config=model_config).layers)


def attends_to_all(layer: Any, model_config: Any) -> bool:
    """Whether a layer of such a cache keeps all tokens: a full-attention one, also with a recurrence beside it, or one
    whose window no text fills."""
    # Exact types: subclasses are other kinds of layer.
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer) or (
        type(layer) is DynamicSlidingWindowLayer and is_wide(layer.sliding_window, model_config)
    )


def is_wide(window: int, model_config: Any) -> bool:
    """Whether a window holds the longest text that the model was made for, as Phi-3's 262,144 of 131,072 do."""
    most = max_positions(model_config)
    return most is not None and window >= most


def widest_text(layers: list[Any], model_config: Any) -> int | None:
    """The tokens that those of the layers that are ours attend to at most, where some have a window; else None."""
    windows = (getattr(layer, "sliding_window", None) for layer in layers if attends_to_all(layer, model_config))
    return min(filter(None, windows), default=None)


def max_positions(model_config: Any) -> int | None:
    """`max_position_embeddings`, in which a scaling of positions may be counted or not: see `positions.made_for`. None
    if the config does not say."""
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
