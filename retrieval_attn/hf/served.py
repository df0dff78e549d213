"""Refuses models whose attention cannot be served, with the reason, from their configuration: no weights are read."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from retrieval_attn.hf.auto_class import model_class
from retrieval_attn.hf.layers import attends_to_all, stock_layers
from retrieval_attn.hf.versions import KEEPS_RECURRENT_STATE


def refuse_unserved(model_config: Any) -> None:
    """Raise ValueError, with the model's name and the reason, if its attention cannot be served."""
    text = model_config.get_text_config(decoder=True)
    for check in _CHECKS:
        for reason in check(model_config, text):
            raise ValueError(f"{model_type(model_config)!r} {reason}")


def model_type(model_config: Any) -> str:
    """The name by which transformers knows the kind of model, for messages."""
    return str(getattr(model_config, "model_type", type(model_config).__name__))


def _not_causal(model_config: Any, text: Any) -> Iterator[str]:
    if getattr(model_config, "is_encoder_decoder", False):
        yield "is an encoder-decoder; only decoder-only causal language models are served"
    if any(hasattr(text, name) for name in _OF_A_DECODER_HALF):
        yield "is one half of an encoder-decoder; only decoder-only causal language models are served"
    if getattr(text, "model_type", "") in _ENCODERS and not getattr(text, "is_decoder", False):
        yield _BOTH_WAYS
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        yield _BOTH_WAYS


def _named(model_config: Any, text: Any) -> Iterator[str]:
    for config in (model_config, text):
        if (name := getattr(config, "model_type", "")) in _NAMED:
            yield _NAMED[name]


def _other_scores(model_config: Any, text: Any) -> Iterator[str]:
    if _stated(text, "kv_lora_rank"):
        yield "uses multi-head latent attention (MLA), whose cache holds no keys to retrieve"
    if any(_stated(text, name) for name in _OF_AN_INDEX):
        yield "chooses keys by a sparse index of its own, so there is nothing left to retrieve"
    if _stated(text, "attn_logit_softcapping"):
        yield "softcaps its attention logits, which are then not inner products to search by"
    if getattr(text, "alibi", False) or getattr(text, "model_type", "") in _ALIBI:
        yield "adds a bias for distance (ALiBi) to its attention logits, which are then not inner products to search by"
    if _stated(text, "rel_extent"):
        yield "adds a learned bias for distance to its attention logits, which are then not inner products to search by"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "shares keys and values between layers, which is not supported"


def _other_code(model_config: Any, text: Any) -> Iterator[str]:
    """By the model's class, where transformers names one; its modelling code is imported, nothing is made."""
    made = model_class(text) or model_class(model_config)
    if made is not None and not _calls_interface(made):
        yield _NO_INTERFACE
    whole = model_class(model_config)
    if whole is not None and (asked := _asks_beside_text(whole)):
        yield f"takes no text alone: it asks for {' and '.join(asked)}, too"


def _asks_beside_text(made: Any) -> list[str]:
    """What a pass needs besides the text, as an image."""
    taken = inspect.signature(made.forward).parameters.values()
    named = (one for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty)
    return [one.name for one in named if one.name not in ("self", "input_ids")]


@functools.cache
def _calls_interface(made: Any) -> bool:
    """What transformers finds out by reading the source of a class; every cache asks."""
    return bool(made._can_set_attn_implementation())


def _no_layer_of_ours(model_config: Any, text: Any) -> Iterator[str]:
    kinds = getattr(text, "layer_types", None) or ()
    if not KEEPS_RECURRENT_STATE and not _RECURRENT.isdisjoint(kinds):
        yield (
            "has layers with a recurrent state, which the caches of this transformers version do not keep; "
            "upgrade transformers"
        )
    if not _stated(text, "num_attention_heads") or getattr(text, "model_type", "") in _NO_ATTENTION:
        yield "has no attention layers, so there is nothing to retrieve"
    if not any(attends_to_all(layer, model_config) for layer in stock_layers(model_config)):
        found = f" (its layers are {', '.join(sorted(set(kinds)))})" if kinds else ""
        yield f"has no layer of full attention alone{found}, so there is nothing to retrieve"


def _stated(text: Any, name: str) -> bool:
    """Whether a config has a value under this name, for all of its layers or for one."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return any(getattr(layer, name, None) is not None for layer in layers)


_CHECKS: tuple[Callable[[Any, Any], Iterator[str]], ...] = (
    _not_causal,
    _named,
    _other_scores,
    _other_code,
    _no_layer_of_ours,
)

_OF_A_DECODER_HALF = ("decoder_layers", "num_decoder_layers", "decoder_attention_heads")

_OF_AN_INDEX = ("index_topk", "index_topk_blocks", "index_n_heads")

# Listed by transformers among the causal models, but they attend both ways unless made decoders. Known by name, because
# before 5.0 every config says is_decoder=False.
_ENCODERS = {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"}

_ENCODERS |= {"rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"}

_ENCODERS |= {"xmod"}

_BOTH_WAYS = "attends in both directions; only causal language models are served"

_NO_INTERFACE = "does not call transformers' attention interface, through which keys are retrieved"

_SAM = "sees through SAM, which takes no attention function"

_NEEDS_PIXELS = "takes no text alone: it asks for pixel_values, too"

# What no general rule finds: how their code treats keys.
_NAMED = {
    "deepseek_ocr2": _SAM,
    "deepseek_vl_hybrid": _SAM,
    "diffllama": "attends twice to one layer's keys with other values, which is not supported",
    "diffusion_gemma": "writes a block of tokens at once, by diffusion",
    "doge": "masks keys by a rule that it has learned, so inner products do not say which count",
    "gemma4_assistant": "drafts from the keys of another model, whose cache it needs",
    "gemma4_unified": "asks for a mask of its own on top of the causal one (its text model alone, "
    "'gemma4_unified_text', is served)",
    "gemma4_unified_assistant": "drafts from the keys of another model, whose cache it needs",
    "git": _NO_INTERFACE,
    "idefics": _NEEDS_PIXELS,
    "jetmoe": "repeats its keys for every attention expert, outside the cache, which is not supported",
    "kosmos-2": _NEEDS_PIXELS,
    "kosmos-2.5": "counts positions by a rule of its own, and cannot be told them",
    "mllama": "attends to images in layers of their own, which is not supported",
    "minimax": "brings a cache of its own, so no other can keep its keys",
    # transformers 4.57 does not say so of its class.
    "openai-gpt": _NO_INTERFACE,
    # Before 5.0 its config does not say so.
    "paligemma": _BOTH_WAYS,
    "shieldgemma2": "judges images, and writes no text",
}

_ALIBI = {"bloom", "mpt"}

# Kinds of layers that keep no keys.
_RECURRENT = {"conv", "linear_attention"}

_NO_ATTENTION = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}
