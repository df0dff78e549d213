"""How a GGUF file scales positions, as a transformers config says it. transformers reads it of gpt-oss alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retrieval_attn.hf.gguf_header import GgufHeader
from retrieval_attn.hf.positions import kind_of, ropes_of, with_rope

_FACTORS = "rope_freqs.weight"

# The file has a factor for each frequency, and not the three numbers that they were made of. These are Llama 3.1's to
# 3.3's; other ones are noticed.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What a file may say of scaling, for those kinds that need no more than this.
_SAID = {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"}


def with_scaled_positions(model_config: Any, header: GgufHeader) -> Any:
    """A model's config with the scaling that its file says; itself, where the file says none or transformers read it.

    Raises ValueError, in one line, for scaling that is not known: the model's text would be wrong.
    """
    text = model_config.get_text_config(decoder=True)
    said = {name for name in map(header.own_name, header.fields) if name.startswith(("rope.scaling.", "rope.scale_"))}
    factors = {name for name in header.tensors if name.startswith("rope_f")}
    kind = _kind(header)
    if (kind == "none" and not factors and said <= _SAID) or any(kind_of(rope) != "default" for rope in ropes_of(text)):
        return model_config
    if kind == "none" and factors == {_FACTORS}:
        asked = _llama3(text, header.numbers(_FACTORS))
    elif kind in ("linear", "yarn") and not factors and said <= _SAID:
        asked = _by_factor(kind, header)
    else:
        asked = None
    if asked is None:
        named = ", ".join(sorted(factors | said))
        raise ValueError(
            f"{str(header.path)!r} scales positions (RoPE) as is not read from a GGUF file ({named}); load the folder "
            "that it was made from"
        )
    return with_rope(model_config, asked)


def _kind(header: GgufHeader) -> str:
    """A factor without a kind is linear, as for llama.cpp; a factor of 1 scales nothing."""
    kind, factor = header.of_model("rope.scaling.type"), header.of_model("rope.scaling.factor")
    if factor == 1 and kind in (None, "linear"):
        return "none"
    return str(kind or ("linear" if factor else "none"))


def _by_factor(kind: str, header: GgufHeader) -> Mapping[str, Any] | None:
    factor, original = header.of_model("rope.scaling.factor"), header.of_model("rope.scaling.original_context_length")
    if not factor or factor <= 1 or (kind == "yarn" and not original):
        return None
    length = {"original_max_position_embeddings": original} if original else {}
    return {"rope_type": kind, "factor": float(factor), **length}


def _llama3(text: Any, factors: np.ndarray) -> Mapping[str, Any] | None:
    """Llama 3's parameters that give these factors; None if none do."""
    # Rounded, because the file's are quotients in float32.
    factor = round(float(factors.max(initial=1.0)), 3)
    if factor <= 1:
        return None
    asked = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    base = float(ropes_of(text)[0].get("rope_theta", 10_000.0))
    plain = base ** (-np.arange(len(factors)) / len(factors))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](with_rope(text, asked), "cpu")
    same = len(scaled) == len(factors) and np.allclose(scaled.numpy() * factors, plain, rtol=1e-3)
    return asked if same else None
