"""Rotary embeddings whose frequencies depend on how long the text is: "longrope" and "dynamic".

transformers chooses them in every forward pass, by its largest position, and keeps them in a buffer of the model. So
the early chunks of a long prompt would be turned like a short text, and two sessions of one model change each other's.
Nothing is patched: during a pass of ours, hooks put the last position of the whole text beside those of the pass.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retrieval_attn.hf.positions import kind_of, ropes_of

# One pass at a time where passes write to the model's buffers.
_locks: "weakref.WeakKeyDictionary[torch.nn.Module, threading.Lock]" = weakref.WeakKeyDictionary()
_making_locks = threading.Lock()


def rope_border(model_config: Any) -> int | None:
    """The longest text that "longrope" turns with its short factors; None for models that turn all texts alike."""
    text = model_config.get_text_config(decoder=True)
    for rope in ropes_of(text):
        if kind_of(rope) == "longrope":
            stated = rope.get("original_max_position_embeddings")
            return stated or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
    return None


def same_turning(model_config: Any, lengths: list[tuple[int, int]]) -> bool:
    """Whether texts are turned alike in one batch as each would be alone, from its first to its last length."""
    border = rope_border(model_config)
    if border is not None:
        return all(last <= border for _, last in lengths) or all(first > border for first, _ in lengths)
    text = model_config.get_text_config(decoder=True)
    dynamic = any("dynamic" in kind_of(rope) for rope in ropes_of(text))
    return not dynamic or all(last <= text.max_position_embeddings for _, last in lengths)


class Turning:
    """Tells the rotary modules of a model how long the text is of which a pass is a part."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._rotaries = [module for module in model.modules() if _by_length(module)]
        self._lock = _lock_of(model) if self._rotaries else None

    @contextmanager
    def of_text(self, n_tokens: int) -> Iterator[None]:
        """Inside, the calling thread's passes turn their tokens as parts of a text of `n_tokens`."""
        if self._lock is None:
            yield
            return
        with self._lock:
            handles = [
                handle
                for rotary in self._rotaries
                for handle in (
                    rotary.register_forward_pre_hook(_with_last_position(n_tokens - 1), with_kwargs=True),
                    rotary.register_forward_hook(_without_last_position),
                )
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


def _with_last_position(last: int) -> Any:
    """A hook that adds a position to those of a pass: a rotary module goes by the largest."""

    def add(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        # A "dynamic" module remembers the longest text, of whichever session, until it meets a short one.
        _call(rotary, args, kwargs, torch.zeros_like(positions[..., :1]))
        extended = torch.cat([positions, torch.full_like(positions[..., :1], last)], dim=-1)
        return _replaced(args, kwargs, extended)

    return add


def _without_last_position(rotary: Any, args: tuple[Any, ...], turns: Any) -> Any:
    if isinstance(turns, Tensor):
        return turns[..., :-1, :]
    return tuple(part[..., :-1, :] for part in turns)


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> tuple[Any, dict[str, Any]]:
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs


def _call(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> None:
    args, kwargs = _replaced(args, kwargs, positions)
    rotary.forward(*args, **kwargs)


def _lock_of(model: torch.nn.Module) -> threading.Lock:
    with _making_locks:
        return _locks.setdefault(model, threading.Lock())


def _by_length(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in named)
