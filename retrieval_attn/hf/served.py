"""Refuses models whose attention cannot be served, with the reason."""

from typing import Any

from retrieval_attn.hf.versions import KEEPS_RECURRENT_STATE


def refuse_unserved(model_config: Any) -> None:
    """Raise ValueError, with the model's name and the reason, if its attention cannot be served."""
    name = model_type(model_config)
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{name!r} is an encoder-decoder; only decoder-only causal language models are served")
    text = model_config.get_text_config(decoder=True)
    if getattr(text, "model_type", "") in _ENCODERS and not getattr(text, "is_decoder", False):
        raise ValueError(f"{name!r} attends in both directions; only causal language models are served")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ValueError(f"{name!r} uses multi-head latent attention (MLA), whose cache holds no keys to retrieve")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name!r} softcaps its attention logits, which are then not inner products to search by")
    if getattr(text, "model_type", "") == "gpt_oss":
        raise ValueError(f"{name!r} has learned attention sinks, which are not supported")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError(f"{name!r} shares keys and values between layers, which is not supported")
    if not KEEPS_RECURRENT_STATE and not _RECURRENT.isdisjoint(getattr(text, "layer_types", None) or ()):
        raise ValueError(
            f"{name!r} has layers with a recurrent state, which the caches of this transformers version do not keep; "
            "upgrade transformers"
        )
    if getattr(text, "num_attention_heads", None) is None or getattr(text, "model_type", "") in _NO_ATTENTION:
        raise ValueError(f"{name!r} has no attention layers, so there is nothing to retrieve")


# Listed by transformers among the causal models, but they attend both ways unless made decoders. Known by name, because
# before 5.0 every config says is_decoder=False.
_ENCODERS = {"bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"}

_ENCODERS |= {"roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"}

# Kinds of layers that keep no keys.
_RECURRENT = {"conv", "linear_attention"}

_NO_ATTENTION = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}


def model_type(model_config: Any) -> str:
    """The name by which transformers knows the kind of model, for messages."""
    return str(getattr(model_config, "model_type", type(model_config).__name__))
