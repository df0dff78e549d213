"""One index, one file: safetensors with a JSON header and a checksum for everything in it. No pickle.

The tensors are the index's own arrays and, unless left out, `keys`; bfloat16 keys are stored as uint16 and the
header says so.
"""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retrieval_attn.arrays import Array
from retrieval_attn.atomic_file import replacing
from retrieval_attn.index.keys import DTYPES, Keys, as_layout, fingerprint
from retrieval_attn.index.lift import Lift

FORMAT = "retrieval-attn-index"
VERSION = 2


class Saved(NamedTuple):
    """What a file holds: the kind, its JSON-able settings, its arrays, and the keys to use with them."""

    kind: str
    settings: dict[str, Any]
    arrays: dict[str, Array]
    keys: Keys


def write(
    path: str | PathLike[str],
    kind: str,
    settings: dict[str, Any],
    arrays: dict[str, Array],
    keys: Keys,
    with_keys: bool,
) -> None:
    """Write one file; a crash leaves the old file, never half a new one."""
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if with_keys:
        tensors["keys"] = np.ascontiguousarray(keys.array)
    header = {
        "kind": kind,
        "settings": settings,
        "shape": list(keys.shape),
        "dtype": keys.dtype_name,
        "lift": [keys.lift.scale, keys.lift.seed] if keys.lift else None,
        "fingerprint": fingerprint(keys.array),
        "sha256": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(header, sort_keys=True)
    # One entry: several would be written in random order, and equal indexes should give equal files.
    metadata = {FORMAT: f"{VERSION} {_digest(text.encode())} {text}"}
    with replacing(path) as part:
        save_file(tensors, part, metadata)


def read(path: str | PathLike[str], keys: Any = None, verified: bool = False) -> Saved:
    """Read and check one file. Raises FileNotFoundError, or ValueError saying why the file is refused.

    keys: the caller's (G, S, D) keys, used in place of those in the file; their fingerprint must agree. verified: as
    in `load_index`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no index file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _checked_header(path, file.metadata() or {})
            names = [name for name in file.keys() if name != "keys" or keys is None]  # noqa: SIM118 (no iterator)
            arrays = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no index file: {error}") from error
    for name in header["sha256"]:
        if name not in arrays and not (name == "keys" and keys is not None):
            raise ValueError(f"{path} is damaged: {name!r} is missing")
    for name, array in arrays.items():
        if name not in header["sha256"] or not (verified or _digest(array) == header["sha256"][name]):
            raise ValueError(f"{path} is damaged: the checksum of {name!r} does not agree")
    return Saved(header["kind"], header["settings"], arrays, _keys(path, header, arrays.pop("keys", None), keys))


def _checked_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(f"{path} is no index file: its metadata has no {FORMAT!r}")
    version, digest, text = (*metadata[FORMAT].split(" ", 2), "", "")[:3]
    if version != str(VERSION):
        raise ValueError(
            f"{path} has index file version {version}, this program reads version {VERSION}; build the index again"
        )
    if _digest(text.encode()) != digest:
        raise ValueError(f"{path} is damaged: the checksum of its header does not agree")
    return json.loads(text)


def _keys(path: Path, header: dict[str, Any], stored: Array | None, given: Any) -> Keys:
    lift = None
    if header["lift"]:
        scale, seed = header["lift"]
        lift = Lift(scale, seed, header["shape"][0])
    if given is None:
        if stored is None:
            raise ValueError(f"{path} was saved without its keys; pass them: load_index(path, keys=...)")
        return Keys(stored, lift=lift)
    array = as_layout(given, "keys")
    shape, dtype = tuple(header["shape"]), DTYPES[header["dtype"]]
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path} belongs to keys {shape} {header['dtype']}, got {array.shape} {array.dtype}")
    if fingerprint(array) != header["fingerprint"]:
        raise ValueError(f"{path} belongs to other keys: the fingerprints of shape, dtype and sampled rows differ")
    return Keys(array, lift=lift)


def _digest(data: Any) -> str:
    # An empty array has no memory to look at.
    raw = data if isinstance(data, bytes) else memoryview(data).cast("B") if data.size else b""
    return hashlib.sha256(raw).hexdigest()
