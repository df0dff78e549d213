"""Sessions on disk: a folder of safetensors files and one JSON manifest; never pickle.

Written to a temporary folder beside the target, flushed, then renamed, so a folder under the session's name is whole.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrieval_attn.build import needs_tail
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf import RetrievalLayer
from retrieval_attn.index import load_index
from retrieval_attn.kernels import TailSummary
from retrieval_attn.memory import LayerMemory

if TYPE_CHECKING:
    from retrieval_attn.llm import LLM
    from retrieval_attn.session import Session

FORMAT = 1
MANIFEST = "manifest.json"


def save_session(session: "Session", directory: Path) -> None:
    """Write a session to a new folder. Raises FileExistsError if there is one that is not a session."""
    if directory.exists() and not (directory / MANIFEST).exists():
        raise FileExistsError(f"{directory} exists and is not a saved session; choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(session, temporary)
        _replace(directory, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(directory: Path, new: Path) -> None:
    """Put `new` in the place of `directory`; interrupted, the old one is put back."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    replacing = directory.exists()
    if replacing:
        directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        if replacing:
            old.rename(directory)
        raise
    _flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_session(llm: "LLM", directory: Path) -> "Session":
    """Read a session back; the reverse of `save_session`. Raises ValueError with the reason for anything unfit."""
    manifest = _read_manifest(directory)
    if manifest["model"] != fingerprint(llm):
        raise ValueError(f"{directory} was saved with another model; load that one to restore it")
    _check_config(directory, RetrievalConfig.from_dict(manifest["config"]), llm.config)
    _check_files(directory, manifest["files"])
    session = llm.session(manifest["system"])
    session.token_ids, session.messages = manifest["token_ids"], manifest["messages"]
    session._answer_start, session._turn_open = manifest["answer_start"], manifest["turn_open"]
    session._cached = manifest["cached_ids"]
    for i, layer in enumerate(session.cache.layers):
        if manifest["cached_ids"]:
            _read_layer(layer, directory, i, llm.model.device)
    return session


def _check_config(directory: Path, saved: RetrievalConfig, ours: RetrievalConfig) -> None:
    """Options that decide what is stored must agree; the others may differ."""
    for name in ("index", "n_sink", "n_local", "exact_below"):
        if getattr(saved, name) != getattr(ours, name):
            raise ValueError(
                f"{directory} was saved with {name}={getattr(saved, name)!r}, but the model is loaded with "
                f"{getattr(ours, name)!r}; load it with the saved value"
            )
    # The index of a weighted sample ranks keys with random bonuses.
    if (saved.estimator == "lift") != (ours.estimator == "lift"):
        raise ValueError(
            f"{directory} was saved with estimator={saved.estimator!r}, but the model is loaded with "
            f"{ours.estimator!r}; load it with the saved value"
        )


def fingerprint(llm: "LLM") -> str:
    """What a cache depends on: the model's configuration and its weights, sampled."""
    config = llm.model.config.to_diff_dict()
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(llm.model.named_parameters()):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(name.encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    digest.update(str(llm.model.dtype).encode())
    return digest.hexdigest()


def _write(session: "Session", folder: Path) -> None:
    for i, layer in enumerate(session.cache.layers):
        if layer.is_initialized:
            _write_layer(layer, folder, i)
    manifest = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("retrieval-attn", "transformers", "torch")},
        "model": fingerprint(session.llm),
        "config": asdict(session.llm.config),
        "system": session.system,
        "token_ids": session.token_ids,
        "messages": session.messages,
        "answer_start": session._answer_start,
        "turn_open": session._turn_open,
        # Not always the first of token_ids: a turn may have been interrupted in its prefill.
        "cached_ids": session._cached,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _write_layer(layer: Any, folder: Path, i: int) -> None:
    if not isinstance(layer, RetrievalLayer):
        if getattr(layer, "keys", None) is None:
            raise ValueError(f"layer {i} ({type(layer).__name__}) holds state that cannot be saved")
        tensors = {"keys": layer.keys.contiguous(), "values": layer.values.contiguous()}
        save_file(tensors, folder / f"layer-{i:03d}.safetensors", {"length": str(layer.get_seq_length())})
        return
    for memory in layer.memories:
        tensors = {"keys": memory.store.keys(), "values": memory.store.values(), **memory.sample.state()}
        if memory.split.n_far:
            memory.index().save(folder / f"layer-{i:03d}.index", with_keys=False)
            if needs_tail(memory.config):
                tensors |= memory.tail().state()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"layer-{i:03d}.safetensors")


def _read_layer(layer: Any, folder: Path, i: int, device: torch.device) -> None:
    path = folder / f"layer-{i:03d}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    keys, values = tensors["keys"], tensors["values"]
    if not isinstance(layer, RetrievalLayer):
        _refill_stock(layer, keys.to(device), values.to(device), path)
        return
    layer.lazy_initialization(keys[None], values[None])
    memory: LayerMemory = layer.memories[0]
    memory.refill(keys, values, tensors, device)
    layer._seen = memory.length
    if memory.split.n_far:
        index = load_index(folder / f"layer-{i:03d}.index", keys=memory.far_keys())
        memory.adopt_index(index, TailSummary.restore(tensors) if "tail_means" in tensors else None)


def _refill_stock(layer: Any, keys: Tensor, values: Tensor, path: Path) -> None:
    from safetensors import safe_open

    layer.update(keys, values)
    if hasattr(layer, "cumulative_length"):
        with safe_open(path, "pt") as file:
            layer.cumulative_length = int(file.metadata()["length"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no saved session at {directory} ({MANIFEST} is missing)") from None
    except ValueError as error:
        raise ValueError(f"{directory / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{directory} has format {manifest.get('format')!r}, this version reads format {FORMAT}")
    return manifest


def _check_files(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, {size} were written")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
