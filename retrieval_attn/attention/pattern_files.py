"""Files that say how each head of a model prefills, in the form in which MInference publishes them.

A JSON list over layers. Each layer maps head numbers, as strings, to [type, vertical, slash, score]:

    [{"0": ["vertical_and_slash", 1000, 6096, 0.98], "1": ["stream_llm", 1024, 4096, 0.95]},
     {"0": ["block_sparse", 80, 0, 0.97]}]

Of "stream_llm", our "a_shape", the sizes are the first and the last tokens; of "block_sparse", vertical is how many
blocks of 64 keys. "dense" is our own addition. A head that a layer leaves out is ["vertical_and_slash", 1000, 6096].
"""

import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrieval_attn.atomic_file import write_whole
from retrieval_attn.kernels import HeadPattern
from retrieval_attn.kernels.sparse.patterns import DEFAULT_SIZES, check_patterns

# Their types, and ours.
KINDS = {
    "vertical_and_slash": "vertical_slash",
    "stream_llm": "a_shape",
    "block_sparse": "block_sparse",
    "dense": "dense",
}
TYPES = {kind: name for name, kind in KINDS.items()}

# What a head is that the file does not name.
ABSENT = DEFAULT_SIZES["vertical_slash"]

# Longer than any text; sizes above it would not fit the kernels' integers.
LARGEST = 2**31 - 1


def load_patterns(path: str | Path, n_layers: int, n_heads: int) -> list[list[HeadPattern]]:
    """The pattern of each query head in each layer of a model with `n_layers` layers of `n_heads` heads.

    Scores are checked and left aside. Raises FileNotFoundError if there is no such file, other OSErrors if it cannot be
    read, and ValueError, naming the file, the layer and the head, for what is not such a file or is one for another
    model.
    """
    path = Path(path).expanduser()
    layers = _read(path)
    if len(layers) != n_layers:
        raise ValueError(f"{path} has {len(layers)} layers, the model {n_layers}: it is for another model")
    return [_read_layer(f"{path}, layer {i}", layer, n_heads) for i, layer in enumerate(layers)]


def save_patterns(
    path: str | Path, patterns: Sequence[Sequence[HeadPattern]], scores: Sequence[Sequence[float]]
) -> None:
    """Write the pattern and the score of each head of each layer, a layer per line, scores to six decimals.

    The file is whole or not there: an existing one is replaced at the end. Raises ValueError for patterns that are
    none or scores that are not finite, OSError if it cannot be written.
    """
    lines = [_write_layer(*layer) for layer in zip(patterns, scores, strict=True)]
    write_whole(Path(path).expanduser(), "[\n" + ",\n".join(lines) + "\n]\n")


def check_savable(path: str | Path) -> None:
    """Raise ValueError now if `save_patterns` could not write there later, or `RetrievalConfig` would not read it."""
    given, path = path, Path(path).expanduser().resolve()
    if path.suffix != ".json":
        raise ValueError(f"a pattern file must end in .json, got {str(given)!r}")
    if path.exists() and not path.is_file():
        raise ValueError(f"a pattern file must be a file, got the folder or device {str(given)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"a pattern file must lie in a folder that exists, got {str(given)!r}")
    # The folder too, because a new file takes the old one's place.
    if not all(os.access(place, os.W_OK) for place in (path, path.parent) if place.exists()):
        raise ValueError(f"a pattern file must be writable, got {str(given)!r}")


def _read(path: Path) -> list[Any]:
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no pattern file {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a pattern file, because it is not JSON: {error}") from error
    if not isinstance(layers, list):
        raise ValueError(f"{path} must hold a list over layers, got {reprlib.repr(layers)}")
    return layers


def _read_layer(where: str, layer: Any, n_heads: int) -> list[HeadPattern]:
    if not isinstance(layer, dict):
        raise ValueError(f"{where}: must map head numbers to [type, vertical, slash, score], got {reprlib.repr(layer)}")
    found = [ABSENT] * n_heads
    for name, entry in layer.items():
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
            raise ValueError(f"{where}: heads must be numbered from 0, got {reprlib.repr(name)}")
        if int(name) >= n_heads:
            raise ValueError(f"{where}, head {name}: the model has {n_heads} heads: it is for another model")
        found[int(name)] = _read_head(f"{where}, head {name}", entry)
    return found


def _read_head(where: str, entry: Any) -> HeadPattern:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ValueError(f"{where}: must be [type, vertical, slash, score], got {reprlib.repr(entry)}")
    name, vertical, slash, score = entry
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{where}: type must be one of {', '.join(KINDS)}, got {reprlib.repr(name)}")
    for size in (vertical, slash):
        if type(size) is not int or not 0 <= size <= LARGEST:
            raise ValueError(f"{where}: sizes must be integers from 0 to {LARGEST}, got {reprlib.repr(size)}")
    # NaN alone differs from itself.
    if type(score) not in (int, float) or score != score:
        raise ValueError(f"{where}: score must be a number, got {reprlib.repr(score)}")
    return HeadPattern(KINDS[name], vertical, slash)


def _write_layer(patterns: Sequence[HeadPattern], scores: Sequence[float]) -> str:
    check_patterns(patterns, len(scores))
    heads = {
        str(head): [TYPES[pattern.kind], pattern.vertical, pattern.slash, round(score, 6)]
        for head, (pattern, score) in enumerate(zip(patterns, scores, strict=True))
    }
    return json.dumps(heads, allow_nan=False)
