"""Differences between the transformers versions we serve (4.57 to 5.x), and nothing else."""

import inspect
from typing import Any

import torch
import transformers.cache_utils
from packaging.version import Version
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE_ARGUMENT",
    "KEEPS_RECURRENT_STATE",
    "READS_GGUF",
    "AttentionMaskInterface",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "cache_argument",
    "causal_mask_function",
    "misshapen_weights",
    "query_length",
    "sdpa_mask",
]

# The name by which forward passes and `generate` take a cache: all of transformers renamed it at once, in 5.24.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


# Whether caches have layers for what is no attention. Before, such models brought caches of their own.
KEEPS_RECURRENT_STATE = hasattr(transformers.cache_utils, "LinearAttentionLayer")


def _layer_class(name: str) -> Any:
    """A kind of cache layers; where it is unknown, models that need it are refused, and nothing is of this class."""
    return getattr(transformers.cache_utils, name, type(name, (), {}))


LinearAttentionAndFullAttentionLayer = _layer_class("LinearAttentionAndFullAttentionLayer")
LinearAttentionCacheLayerMixin = _layer_class("LinearAttentionCacheLayerMixin")
LinearAttentionLayer = _layer_class("LinearAttentionLayer")

# Whether the tokens of a GGUF file are its own: 4.57 puts a second BOS before a chat, and cuts Gemma's words to pieces.
READS_GGUF = Version(transformers.__version__) >= Version("5.18")


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model: `model(ids, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}


def query_length(argument: Any) -> int:
    """The number of new tokens, from what `get_mask_sizes` was given: an int, before 5.4 a `cache_position`."""
    return int(argument.shape[0]) if isinstance(argument, torch.Tensor) else int(argument)


def misshapen_weights(report: dict[str, Any]) -> list[str]:
    """Names of the weights that have other shapes than the model's, from what `from_pretrained` tells of its work."""
    return sorted(one if isinstance(one, str) else one[0] for one in report["mismatched_keys"])
