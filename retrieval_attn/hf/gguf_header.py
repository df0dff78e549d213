"""What a GGUF file says of itself, from its header alone: its fields, and which tensors it must hold.

transformers reads the weights, and headers too; but what it says of a cut file is what numpy says, and it takes seconds
over a vocabulary that is only passed by here.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The file format is described in llama.cpp's repository, docs/gguf.md.
MAGIC = b"GGUF"

_VERSIONS = (2, 3)

# How struct names the kinds of numbers that a field may hold.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_TEXT, _ARRAY = 8, 9

# Among the kinds of numbers of a tensor.
_FLOAT32 = 0


class TensorPlace(NamedTuple):
    """start and end: bytes of the file. kind: of its numbers, as `gguf` counts them."""

    file: Path
    shape: tuple[int, ...]
    kind: int
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """fields: numbers and texts by name; of a list, its length. tensors: by name, in all files of a model in parts.

    path: of the file, or of the first part.
    fields_end: the byte where the fields end, and the descriptions of tensors begin.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]
    fields_end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the file, or of all parts, up to the last tensor."""
        ends: dict[Path, int] = {}
        for tensor in self.tensors.values():
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.end)
        return sum(ends.values())

    @property
    def alignment(self) -> int:
        """A tensor begins at a multiple of this many bytes."""
        return int(self.fields.get("general.alignment", 32))

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model; empty if the file does not say."""
        return str(self.fields.get("general.architecture", ""))

    def of_model(self, name: str) -> Any:
        """A field of the architecture's own, as "rope.freq_base"; None if it is not there."""
        return self.fields.get(f"{self.architecture}.{name}")

    def own_name(self, field: str) -> str:
        """The name of a field without the architecture's."""
        return field.removeprefix(f"{self.architecture}.")

    def numbers(self, name: str) -> NDArray[np.float32]:
        """The numbers of a float32 tensor, read from the file. ValueError for other numbers."""
        place = self.tensors[name]
        if place.kind != _FLOAT32:
            raise ValueError(f"{place.file} is damaged: {name} must be float32")
        with place.file.open("rb") as file:
            file.seek(place.start)
            return np.frombuffer(file.read(place.end - place.start), "<f4")


def read_header(path: Path) -> GgufHeader:
    """Read a file's header. Raises ValueError, in one line, for another kind of file, or one that is cut."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(_Cursor(data, at=4), path)
            except (struct.error, KeyError, IndexError, OverflowError, RecursionError):
                raise ValueError(f"{path} is cut or damaged: its header does not end; download it again") from None
            if header.n_bytes > len(data):
                raise ValueError(
                    f"{path} is cut: it must have {header.n_bytes} bytes, but has {len(data)}; download it again"
                )
            return header


class _Cursor:
    """Reads one thing after the other; struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        end = self.at + 8 + self.number("Q")
        if end > len(self.data):
            raise struct.error
        found = self.data[self.at : end]
        self.at = end
        return found.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        return self._pass_list() if kind == _ARRAY else self.number(_NUMBERS[kind])

    def _pass_list(self) -> int:
        """The length of a list. Vocabularies are long, so their words are passed by unread."""
        kind, n = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            self.at += n * struct.calcsize(_NUMBERS[kind])
        for _ in range(0 if kind in _NUMBERS else n):
            if kind == _TEXT:
                self.at += struct.unpack_from("<Q", self.data, self.at)[0] + 8
            else:
                self.value(kind)
        return n


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    version, n_tensors, n_fields = (cursor.number(kind) for kind in "IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"{path} has version {version} of GGUF; versions {' and '.join(map(str, _VERSIONS))} are read")
    fields = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(n_fields)}
    alignment, fields_end = fields.get("general.alignment", 32), cursor.at
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path} is damaged: its general.alignment is {alignment!r}")
    tensors = dict(_tensor(cursor, path) for _ in range(n_tensors))
    start = -(-cursor.at // alignment) * alignment
    places = {name: place._replace(start=start + place.start, end=start + place.end) for name, place in tensors.items()}
    return GgufHeader(path, fields, places, fields_end)


def _tensor(cursor: _Cursor, path: Path) -> tuple[str, TensorPlace]:
    """A tensor's name, and where it lies, counted from where the first tensor begins."""
    name = cursor.text()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in _block_sizes():
        raise ValueError(f"{path} holds numbers of kind {kind} in {name}, which the package gguf does not know")
    block, n_bytes = _block_sizes()[kind]
    return name, TensorPlace(path, shape, kind, offset, offset + prod(shape) // block * n_bytes)


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """How many numbers of a kind lie together, and in how many bytes."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
