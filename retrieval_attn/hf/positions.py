"""How long a text may be, by what a config says of its positions, and scaling them for longer ones."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from retrieval_attn.hf.layers import max_positions
from retrieval_attn.hf.served import model_type

log = logging.getLogger("retrieval_attn")

# Kinds of scaling that a user may ask for, and the largest factor.
SCALINGS = ("yarn", "linear", "dynamic")
MOST = 64

# Kinds whose factor lengthens the text for which a model was trained at first.
_BY_FACTOR = ("yarn", "llama3", "linear", "dynamic", "ntk")


def made_for(model_config: Any) -> int | None:
    """The longest text that a config is for, in tokens: what it says, or the length before scaling times its factor.

    The larger of the two, because many configs say the product already. For "yarn" and "llama3" without that length,
    transformers 5 takes `max_position_embeddings`, and so does this. "linear" without it says nothing: its factor may
    be in `max_position_embeddings` or not. None if the config does not say.
    """
    said = max_positions(model_config)
    if said is None:
        return None
    scaled = [_scaled_length(rope) for rope in ropes_of(model_config.get_text_config(decoder=True))]
    return max(said, *scaled)


def _scaled_length(rope: dict[str, Any]) -> int:
    if kind_of(rope) not in _BY_FACTOR:
        return 0
    return int((rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0))


def warn_if_longer(model_config: Any, max_tokens: int | None) -> None:
    """Say that a limit that the user has set is above what the model was made for."""
    most = made_for(model_config)
    if max_tokens is not None and most is not None and max_tokens > most:
        log.warning(
            "max_tokens=%d is more than the %d tokens that the model was made for; beyond them answers get worse, "
            "unless its positions are scaled (--rope)",
            max_tokens,
            most,
        )


def scaled_positions(model_config: Any, said: str) -> Any:
    """A copy of a model's config whose positions are scaled as `said`: "yarn:4", "linear:2" or "dynamic:2".

    The factor is of the length that the config says. Raises ValueError for anything else, for a model without rotary
    embeddings, and for one that scales its positions already.
    """
    kind, _, number = said.partition(":")
    factor = float(number) if number.replace(".", "", 1).isdigit() else 0.0
    if kind not in SCALINGS or not 1 < factor <= MOST:
        allowed = ", ".join(f"{name}:FACTOR" for name in SCALINGS)
        raise ValueError(f"rope must be {allowed}, 1 < FACTOR <= {MOST}, got {said!r}")
    text = model_config.get_text_config(decoder=True)
    present = _rope_of(text)
    turned = present or getattr(text, "rope_theta", None) is not None
    length = max_positions(text)
    if not turned or length is None:
        raise ValueError(f"{model_type(model_config)!r} has no rotary embeddings to scale; leave rope out")
    for rope in _of_full_attention(present).values():
        if kind_of(rope) != "default":
            named = f"{model_type(model_config)!r} scales its positions already ({kind_of(rope)})"
            raise ValueError(f"{named}; leave rope out")
    asked = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length}
    return with_rope(model_config, asked)


def with_rope(model_config: Any, asked: Mapping[str, Any]) -> Any:
    """A copy of a model's config with these parameters of RoPE beside those it has, for layers with full attention."""
    scaled = copy.deepcopy(model_config)
    text = scaled.get_text_config(decoder=True)
    present = _rope_of(text)
    changed = {name: {**rope, **asked} for name, rope in _of_full_attention(present).items()}
    where = "rope_parameters" if hasattr(text, "rope_parameters") else "rope_scaling"
    setattr(text, where, {**present, **changed.get("", changed)})
    return scaled


def _rope_of(text: Any) -> dict[str, Any]:
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}


def _of_full_attention(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters by kind of layer, "" if all have the same. Layers with a window turn few positions; published models
    scale those of full attention only."""
    nested = {name: one for name, one in rope.items() if isinstance(one, dict)}
    return {"full_attention": nested["full_attention"]} if "full_attention" in nested else nested or {"": rope}


def ropes_of(text: Any) -> list[dict[str, Any]]:
    """The parameters of each kind of rotary embedding; some models have one for each kind of layer."""
    given = _rope_of(text)
    return [rope for rope in given.values() if isinstance(rope, dict)] or [given]


def kind_of(rope: dict[str, Any]) -> str:
    """The kind of scaling that such parameters name; "default" is none."""
    return str(rope.get("rope_type") or rope.get("type") or "default")
