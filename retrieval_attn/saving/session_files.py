"""Sessions on disk: a folder of safetensors files and one JSON manifest; never pickle.

Written to a temporary folder beside the target, flushed, then put in its place in one step, so a folder under the
session's name is whole. Every byte of it is under a checksum.
Restored, keys and values stay in their files, and are read from there as they are needed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.far.index_build import needs_tail
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.index import Index, load_index
from retrieval_attn.kv.address_space import OpenFile
from retrieval_attn.kv.host_store import Extent
from retrieval_attn.kv.window import split
from retrieval_attn.saving.atomic_folder import put_back, write_folder
from retrieval_attn.saving.checksums import MANIFEST, check_files, is_sealed, read_manifest, write_manifest
from retrieval_attn.saving.manifest import check_description, describe, state_of
from retrieval_attn.saving.session_state import SessionState

FORMAT = 2

# As safetensors names them.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}

# What reading raises for a file whose checksum agrees, but which holds other things than a session saves.
_MALFORMED = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class _Part:
    """What is saved of one layer."""

    tensors: dict[str, Tensor]
    index: Index | None = None


def save_session(directory: Path, state: SessionState, cache: RetrievalCache, model: Any) -> None:
    """Write a session to a folder, in the place of an older session if there is one.

    cache: holds the keys of the state's `cached_ids`. model: transformers' own, by which the session is known again.

    Raises FileExistsError if something else is there, ValueError for a model whose layers hold other state than keys
    and values, OSError with the reason (disk full, permission denied) if the folder cannot be written. The older
    session is untouched then, and this one can go on.
    """
    target = _real(directory)
    if os.path.lexists(target) and not is_sealed(target):
        raise FileExistsError(f"{directory} exists and is not a saved session; choose another name")
    parts = [_part(i, layer) for i, layer in enumerate(cache.layers)] if state.cached_ids else []

    def fill(folder: Path) -> None:
        for i, part in enumerate(parts):
            _write_part(part, folder, i)
        write_manifest(folder, FORMAT, describe(state, cache.config, model))

    # How large the files of the indexes will be is not known before they are written.
    write_folder(target, fill, at_least=sum(tensor.nbytes for part in parts for tensor in part.tensors.values()))


def restore_session(directory: Path, cache: RetrievalCache, model: Any) -> SessionState:
    """Read a session back into an empty cache; the reverse of `save_session`.

    Raises FileNotFoundError if there is none; ValueError, naming the file and the reason, for anything unfit: another
    model, options or format, a byte that is not what was written; OSError if a file cannot be read; MemoryError if the
    machine lacks the memory. Only plain files in the folder itself are read, and nothing in them is ever executed.
    """
    put_back(_real(directory))
    manifest = read_manifest(directory, FORMAT)
    check_description(manifest, directory, cache.config, model)
    state = state_of(manifest)
    n_tokens = len(state.cached_ids)
    _check_names(directory / MANIFEST, manifest["files"], cache, n_tokens)
    check_files(directory, manifest["files"])
    for i, layer in enumerate(cache.layers if n_tokens else ()):
        with _nothing_strange(directory / _tensors_name(i)):
            _read_layer(layer, directory, i, n_tokens, model.device)
    return state


def _real(directory: Path) -> Path:
    """Where the folder itself is: what stands beside a link to it could be on another disk."""
    return Path(os.path.realpath(directory))


def _tensors_name(i: int) -> str:
    return f"layer-{i:03d}.safetensors"


def _index_name(i: int) -> str:
    return f"layer-{i:03d}.index"


def _part(i: int, layer: Any) -> _Part:
    if hasattr(layer, "conv_states"):
        raise ValueError(f"layer {i} ({type(layer).__name__}) holds a recurrent state, which cannot be saved")
    if not isinstance(layer, RetrievalLayer):
        return _Part({"keys": layer.keys, "values": layer.values})
    memory: LayerMemory = layer.memories[0]
    tensors = {"keys": memory.store.keys(), "values": memory.store.values(), **memory.state()}
    index = memory.far_index.to_save(memory.far(), memory.build_inputs)
    if index is not None and needs_tail(memory.config):
        tensors |= memory.tail().state()
    return _Part(tensors, index)


def _write_part(part: _Part, folder: Path, i: int) -> None:
    save_file({name: tensor.contiguous() for name, tensor in part.tensors.items()}, folder / _tensors_name(i))
    if part.index is not None:
        part.index.save(folder / _index_name(i), with_keys=False)


def _check_names(path: Path, files: dict[str, Any], cache: RetrievalCache, n_tokens: int) -> None:
    """The manifest must list the files that will be read, and no others."""
    n_indexed = n_covered(split(n_tokens, cache.config.n_sink, cache.config.n_local).n_far)
    expected: set[str] = set()
    for i, layer in enumerate(cache.layers if n_tokens else ()):
        expected.add(_tensors_name(i))
        if n_indexed and isinstance(layer, RetrievalLayer):
            expected.add(_index_name(i))
    wrong = expected ^ set(files)
    if wrong:
        name = min(wrong)
        raise ValueError(f"{path} is damaged: it {'does not list' if name in expected else 'must not list'} {name}")


@contextmanager
def _nothing_strange(path: Path) -> Iterator[None]:
    """What a file of other content than ours makes others raise becomes a ValueError with its name."""
    try:
        yield
    except torch.OutOfMemoryError:
        # The device's fault, not the file's.
        raise
    except _MALFORMED as error:
        # Ours name the file already.
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} does not hold what a session saves ({reason})") from error


def _read_layer(layer: Any, folder: Path, i: int, n_tokens: int, device: torch.device) -> None:
    path = folder / _tensors_name(i)
    if not isinstance(layer, RetrievalLayer):
        tensors = load_file(path)
        layer.update(tensors["keys"].to(device), tensors["values"].to(device))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = n_tokens
        return
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in ("keys", "values")]
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in ("keys", "values")}  # noqa: SIM118
    dtype = tensors["window_keys"].dtype
    layer.lazy_initialization(
        *(torch.empty((1, shape[0], 0, shape[2]), dtype=dtype, device=device) for shape in shapes)
    )
    memory: LayerMemory = layer.memories[0]
    layer.adopt(*_extents(path, memory, n_tokens), n_tokens, tensors, device)
    n_indexed = n_covered(memory.split.n_far)
    if n_indexed:
        # `check_files` has read all of it.
        index = load_index(folder / _index_name(i), keys=memory.far_keys()[:, :n_indexed], verified=True)
        memory.adopt_index(index, tensors)


def _extents(path: Path, memory: LayerMemory, n_tokens: int) -> tuple[Extent, Extent]:
    """Where a file holds the keys and the values, so that they can be read in place; the library tells it nobody."""
    file = OpenFile(os.open(path, os.O_RDONLY))
    n_header = int.from_bytes(os.pread(file.descriptor, 8, 0), "little")
    header = json.loads(os.pread(file.descriptor, n_header, 8))
    extents = []
    for name, stored in (("keys", memory.store.keys()), ("values", memory.store.values())):
        said, expected = header[name], [stored.shape[0], n_tokens, stored.shape[2]]
        if said["shape"] != expected or said["dtype"] != _DTYPES.get(stored.dtype):
            raise ValueError(
                f"{path} must hold {name} {expected} {_DTYPES.get(stored.dtype)}, got {said['shape']} {said['dtype']}"
            )
        extents.append(Extent(file, 8 + n_header + said["data_offsets"][0]))
    return extents[0], extents[1]
