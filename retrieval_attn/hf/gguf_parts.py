"""A model's GGUF file that came in parts: which files they are, and the whole that transformers reads."""

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from retrieval_attn.hf.gguf_header import GgufHeader, TensorPlace, read_header

# As llama.cpp names parts.
_NAME = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# Behind the magic number and the version.
_COUNT_AT = 8


def of_one_model(files: list[Path]) -> bool:
    """Whether these are the parts of one model."""
    found = [_NAME.fullmatch(file.name) for file in files]
    return len({match and (match["model"], match["count"]) for match in found}) == 1 and found[0] is not None


def whole_header(header: GgufHeader) -> GgufHeader:
    """The header of all parts as one, given any part's: the fields of the first, the tensors of all.

    Raises FileNotFoundError for a missing part; ValueError, in one line, for parts that are not named as llama.cpp
    names them, or not of one model.
    """
    count = header.fields["split.count"]
    name = _NAME.fullmatch(header.path.name)
    if name is None or int(name["count"]) != count:
        raise ValueError(f"{header.path} is one of {count} parts; name them MODEL-00001-of-{count:05}.gguf and so on")
    paths = [header.path.with_name(f"{name['model']}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    parts = [_read(path, n + 1, count) for n, path in enumerate(paths)]
    tensors = {name: place for part in parts for name, place in part.tensors.items()}
    said = parts[0].fields.get("split.tensors.count", len(tensors))
    if len(tensors) != said:
        raise ValueError(f"{paths[0]} and the other parts hold {len(tensors)} tensors, not {said}; download them again")
    return replace(parts[0], tensors=tensors)


def _read(path: Path, number: int, count: int) -> GgufHeader:
    if not path.exists():
        raise FileNotFoundError(f"part {number} of {count} is missing: {path}")
    part = read_header(path)
    said = part.fields.get("split.no", -1) + 1, part.fields.get("split.count")
    if said != (number, count):
        raise ValueError(f"{path} says that it is part {said[0]} of {said[1]}; download it again")
    return part


def join(header: GgufHeader, path: Path, weights: bool) -> None:
    """Write one file that holds what all parts do. Without weights it is as long, and takes no room for them."""
    with path.open("wb") as whole:
        with header.path.open("rb") as first:
            fields = bytearray(first.read(header.fields_end))
        struct.pack_into("<Q", fields, _COUNT_AT, len(header.tensors))
        whole.write(fields)
        end = 0
        for name, tensor in header.tensors.items():
            whole.write(_description(name, tensor, end))
            end += _aligned(tensor.end - tensor.start, header)
        start = _aligned(whole.tell(), header)
        if weights:
            for piece in _weights(header):
                whole.seek(_aligned(whole.tell(), header))
                whole.write(piece)
        whole.truncate(start + end)


def _aligned(n_bytes: int, header: GgufHeader) -> int:
    return -(-n_bytes // header.alignment) * header.alignment


def _description(name: str, tensor: TensorPlace, offset: int) -> bytes:
    raw, dims = name.encode(), len(tensor.shape)
    return struct.pack(f"<Q{len(raw)}sI{dims}QIQ", len(raw), raw, dims, *tensor.shape, tensor.kind, offset)


def _weights(header: GgufHeader) -> Iterator[bytes]:
    """Each tensor's bytes, in the order of the descriptions."""
    for file in dict.fromkeys(tensor.file for tensor in header.tensors.values()):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for tensor in header.tensors.values():
                if tensor.file == file:
                    yield data[tensor.start : tensor.end]
