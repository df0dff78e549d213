"""What layers that cannot be cropped held at some length, so that a cache can go back to it.

A layer with a sliding window forgets what leaves it, a recurrent one keeps no tokens at all. Of a text of any length
both hold little: a window, or a state.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Marks that a cache keeps at most.
MOST_MARKS = 4


@dataclass(frozen=True)
class Mark:
    """Layers as they were when the cache held `n_tokens`, by their numbers, in CPU memory; never changed.

    passing: made in the midst of a text, where an interrupted reading goes on, and of no use once it is read.
    """

    n_tokens: int
    layers: Mapping[int, Any]
    passing: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in _tensors(vars(layer)))


def marked(n_tokens: int, layers: Mapping[int, Any], passing: bool = False) -> Mark:
    """A mark of these layers."""
    return Mark(n_tokens, {i: copied(layer, torch.device("cpu")) for i, layer in layers.items()}, passing)


def kept_of(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Of marks in order of length, those to keep: the first, which is most often the end of a document that is asked
    about again and again, and the newest, where the last answers and their questions begin."""
    return tuple(marks) if len(marks) <= MOST_MARKS else (marks[0], *marks[1 - MOST_MARKS :])


def copied(layer: Any, device: torch.device | None = None) -> Any:
    """A stock layer of the same content, which shares no memory with it. device: None for the layer's own.

    Of a tensor that is a part of a larger one, as a window is of the chunk that it ends, only the part is copied.
    """
    twin = copy.copy(layer)
    where = device or getattr(layer, "device", None)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _copied(part, where) for key, part in value.items()})
        else:
            setattr(twin, name, _copied(value, where))
    return twin


def _copied(value: Any, device: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device or value.device, copy=True, memory_format=torch.contiguous_format)


def _tensors(held: Mapping[Any, Any]) -> list[Tensor]:
    parts = [part for value in held.values() for part in (value.values() if isinstance(value, dict) else [value])]
    return [part for part in parts if isinstance(part, Tensor)]
