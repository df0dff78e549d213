"""Describes a session in a manifest, and checks that a manifest fits the model at hand."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.saving.checksums import MANIFEST
from retrieval_attn.saving.session_state import SessionState

_STATE = [field.name for field in fields(SessionState)]

# Options that decide what is stored.
_STORED = ("index", "n_sink", "n_local", "exact_below", "kv_dtype")


def describe(state: SessionState, config: RetrievalConfig, model: Any) -> dict[str, Any]:
    """All that is to be known of a session besides its keys, values and indexes, as plain data for JSON.

    config: of its cache. model: transformers' own.
    """
    return {
        "versions": {name: version(name) for name in ("retrieval-attn", "transformers", "torch")},
        "model": fingerprint(model),
        "config": asdict(config),
        **{name: getattr(state, name) for name in _STATE},
    }


def state_of(said: dict[str, Any]) -> SessionState:
    """The state that a manifest tells, once it has passed `check_description`."""
    return SessionState(
        system=said["system"],
        messages=tuple(said["messages"]),
        token_ids=tuple(said["token_ids"]),
        cached_ids=tuple(said["cached_ids"]),
        answer_start=said["answer_start"],
        turn_open=said["turn_open"],
    )


def check_description(said: dict[str, Any], directory: Path, config: RetrievalConfig, model: Any) -> None:
    """Raise ValueError, with the reason, if this is not what `describe` says of a session that a model can continue.

    config: of the cache that it would be continued in. model: transformers' own.
    """
    path = directory / MANIFEST
    for name, (what, fits) in _FIELDS.items():
        if name not in said:
            raise ValueError(f"{path} is damaged: {name} is missing")
        if not fits(said[name]):
            raise ValueError(f"{path} is damaged: {name} must be {what}, got {brief(said[name])}")
    if said["model"] != fingerprint(model):
        raise ValueError(f"{directory} was saved with another model; load that one to restore it")
    _check_config(directory, said["config"], config)
    _check_ids(path, said, model.get_input_embeddings().num_embeddings)


def fingerprint(model: Any) -> str:
    """A digest of what a cache depends on: the configuration of a transformers model, and its weights, sampled."""
    config = model.config.to_diff_dict()
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(name.encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    digest.update(str(model.dtype).encode())
    return digest.hexdigest()


def _is_ids(x: Any) -> bool:
    return isinstance(x, list) and all(type(i) is int for i in x)


def _is_message(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == {"role", "content"} and all(isinstance(text, str) for text in x.values())


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "versions": ("an object", lambda x: isinstance(x, dict)),
    "model": ("a string", lambda x: isinstance(x, str)),
    "config": ("an object", lambda x: isinstance(x, dict)),
    "system": ("a string or null", lambda x: x is None or isinstance(x, str)),
    "messages": ("a list of role and content", lambda x: isinstance(x, list) and all(map(_is_message, x))),
    "answer_start": ("an integer or null", lambda x: x is None or type(x) is int),
    "turn_open": ("true or false", lambda x: isinstance(x, bool)),
    "token_ids": ("a list of integers", _is_ids),
    "cached_ids": ("a list of integers", _is_ids),
}


def _check_config(directory: Path, options: dict[str, Any], ours: RetrievalConfig) -> None:
    """Options that decide what is stored must agree; the others may differ."""
    try:
        saved = RetrievalConfig.from_dict(options)
    except ValueError as error:
        raise ValueError(f"{directory / MANIFEST} holds a config that is not valid here: {error}") from error
    differing = [name for name in _STORED if getattr(saved, name) != getattr(ours, name)]
    # The index of a weighted sample ranks keys with random bonuses.
    if (saved.estimator == "lift") != (ours.estimator == "lift"):
        differing.append("estimator")
    if differing:
        name = differing[0]
        raise ValueError(
            f"{directory} was saved with {name}={getattr(saved, name)!r}, but the model is loaded with "
            f"{getattr(ours, name)!r}; load it with the saved value"
        )


def _check_ids(path: Path, said: dict[str, Any], vocabulary: int) -> None:
    for name in ("token_ids", "cached_ids"):
        if not all(0 <= i < vocabulary for i in said[name]):
            raise ValueError(f"{path} is damaged: {name} must be between 0 and {vocabulary - 1}")
    if not 0 <= (said["answer_start"] or 0) <= len(said["token_ids"]):
        raise ValueError(f"{path} is damaged: answer_start must lie within token_ids, got {said['answer_start']}")
