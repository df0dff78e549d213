"""Plans the memory of a prompt before it is taken: bytes in CPU memory and on the device, phase by phase."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from retrieval_attn.attention.to_device import reserve
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_choice import choose_index
from retrieval_attn.kv.address_space import OUT_OF_MEMORY
from retrieval_attn.plan import terms
from retrieval_attn.plan.terms import ModelShape

GIB = 2**30

# The phases of a prompt itself; the others are of the process and of sessions on disk.
OF_A_PROMPT = ("prefill", "build", "decode")


@dataclass(frozen=True)
class Base:
    """What a process holds before any text comes, in bytes; nothing, where only the growth is asked for.

    libraries: of the process with compiled kernels (see `terminal/plan_report.py`). weights: as they are held.
    checkpoint: as the files hold them.
    """

    libraries: int = 0
    weights: int = 0
    checkpoint: int = 0


@dataclass(frozen=True)
class Target:
    """Where the model runs.

    memory: bytes of the device, None if unknown or not to be filled. host_memory: of the CPU; None: what is free here.
    """

    device: str = "cpu"
    memory: int | None = None
    host_memory: int | None = None

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Phase:
    """What is held at the peak of a phase: bytes by name, in CPU memory and on the device."""

    name: str
    host_terms: Mapping[str, int]
    device_terms: Mapping[str, int]

    @property
    def host(self) -> int:
        """Bytes in CPU memory."""
        return sum(self.host_terms.values())

    @property
    def device(self) -> int:
        """Bytes on a device that is not the CPU."""
        return sum(self.device_terms.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a context of `n_tokens` takes; plans of several contexts add up field by field.

    host_kv: keys and values in CPU memory, none if they lie on disk, and the marks that a session goes back to where
    layers cannot be cropped. index: the indexes beside them. device_kv: the near window, on the device. passing: what
    is held beside `host` at the peak of prefill, build or decode, in CPU memory.
    """

    n_tokens: int
    host_kv: int
    index: int
    device_kv: int
    passing: int = 0

    @property
    def host(self) -> int:
        """Bytes of the context in CPU memory that grow with it and stay."""
        return self.host_kv + self.index

    def __str__(self) -> str:
        return (
            f"{self.n_tokens} tokens: {self.host_kv / GIB:.2f} GiB of keys and values and {self.index / GIB:.2f} GiB "
            f"of index in CPU memory, {self.device_kv / GIB:.2f} GiB near"
        )

    def check(self, already: int = 0) -> None:
        """Raise MemoryError, with the numbers, if the machine lacks the memory; `already` bytes are held by now.

        A context that is begun has had its peak: what passes is asked for only where nothing is held.
        """
        free = psutil.virtual_memory().available
        need = self.host - already if already else self.host + self.passing
        if need > free:
            raise MemoryError(
                f"{self.n_tokens} tokens need {need / GIB:.1f} GiB more of CPU memory, but {free / GIB:.1f} GiB are "
                f"free; {OUT_OF_MEMORY}"
            )


def plan_memory(model_config: Any, n_tokens: int, dtype: torch.dtype, config: RetrievalConfig) -> MemoryPlan:
    """What `n_tokens` of context take for one sequence of this model, beside what the process holds without it."""
    shape = ModelShape.of(model_config, dtype)
    held = _Held.of(shape, n_tokens, config, Target())
    phases = plan_phases(model_config, n_tokens, dtype, config, Base(), Target())
    peak = max(phase.host for phase in phases if phase.name in OF_A_PROMPT)
    kv = held.kv + held.marks
    return MemoryPlan(n_tokens, kv, held.index, held.window, passing=max(0, peak - kv - held.index))


def plan_phases(
    model_config: Any, n_tokens: int, dtype: torch.dtype, config: RetrievalConfig, base: Base, target: Target
) -> tuple[Phase, ...]:
    """Load, prefill, build, decode, save and restore, each with all that is held at its peak.

    base: what the process holds before any text comes. dtype: of the model's numbers, whatever its weights are.
    """
    shape = ModelShape.of(model_config, dtype)
    held = _Held.of(shape, n_tokens, config, target)
    return tuple(
        Phase(name, host, _on_device(name, shape, held, config, base, target))
        for name, host in _on_host(shape, held, config, base, target).items()
    )


@dataclass(frozen=True)
class _Held:
    """Bytes of CPU memory that a context keeps from phase to phase, and its near window."""

    n_tokens: int
    n_far: int
    kind: str
    ids: int
    tokenizer: int
    kv: int
    marks: int
    pages: int
    sample: int
    window: int
    index: int
    tail: int

    @classmethod
    def of(cls, shape: ModelShape, n_tokens: int, config: RetrievalConfig, target: Target) -> "_Held":
        n_far = max(0, n_tokens - config.n_sink - config.n_local)
        kind = choose_index(config, n_far, shape.n_layers, shape.G, shape.D, free=target.host_memory).kind
        on_disk = config.kv_dir is not None
        return cls(
            n_tokens=n_tokens,
            n_far=n_far,
            kind=kind,
            ids=n_tokens * terms.TOKEN_ID,
            tokenizer=terms.kept_by_heap(n_tokens * terms.TOKENIZING),
            kv=0 if on_disk else terms.stored_kv(shape, n_tokens, config),
            marks=terms.marks(shape),
            pages=0 if on_disk else terms.unused_pages(shape),
            sample=terms.query_sample(shape, config),
            window=terms.near_window(shape, config),
            index=terms.index(shape, kind, n_far, config),
            tail=terms.tail_summary(shape, n_far, config),
        )


def _on_host(
    shape: ModelShape, held: _Held, config: RetrievalConfig, base: Base, target: Target
) -> dict[str, dict[str, int]]:
    """The terms in CPU memory of every phase, in the order of the phases."""
    on_cpu = not target.on_cuda
    start = {"libraries": base.libraries, "weights": base.weights if on_cpu else 0}
    # Files are mapped: their pages are the weights themselves, unless those are of another dtype or place.
    mapped = 0 if on_cpu and base.checkpoint == base.weights else base.checkpoint
    stored = {
        **start,
        "token ids": held.ids,
        "kept from tokenizing": held.tokenizer,
        "keys and values": held.kv,
        "marks": held.marks,
        "unused parts of pages": held.pages,
        "query sample": held.sample,
        "near window": held.window if on_cpu else 0,
    }
    indexed = {**stored, "index": held.index, "tail summary": held.tail}
    n_new = min(held.n_tokens, config.prefill_chunk)
    forward = {"activations": terms.activations(shape, n_new), "logits": terms.logits(shape)} if on_cpu else {}
    decoded = {"decoded tile": terms.decoded_tile(shape, held.n_tokens, config)}
    staging = {} if on_cpu else {"pinned staging": terms.tiles(shape, held.n_tokens, config)}
    scratch = terms.build_scratch(shape, held.kind, held.n_far, config)
    indexed["kept from building"] = terms.kept_by_heap(scratch)
    return {
        "load": {**start, "checkpoint": mapped},
        "prefill": {**stored, **forward, **decoded, **staging},
        "build": {**indexed, "scratch": scratch},
        "decode": {**indexed, "index that grows": terms.one_layer(shape, held.index)},
        "save": {**indexed, "one layer": terms.one_layer(shape, held.kv)},
        # A restored session is read where it lies: no copies, and pages of the usual size.
        "restore": {**indexed, "unused parts of pages": 0, "marks": 0},
    }


def _on_device(
    name: str, shape: ModelShape, held: _Held, config: RetrievalConfig, base: Base, target: Target
) -> dict[str, int]:
    """The terms on a CUDA device in one phase; none for a CPU, whose memory is the host's."""
    if not target.on_cuda:
        return {}
    start = {"CUDA context": terms.CUDA_CONTEXT, "weights": base.weights}
    if name == "load":
        return start
    near = {**start, "near window": held.window}
    if name == "restore":
        return near
    # It stays for later turns.
    near["resident prefix"] = _device_prefix(shape, held, config, sum(near.values()), target)
    if name != "prefill":
        return {**near, "logits": terms.logits(shape)} if name == "decode" else near
    return {
        **near,
        "tiles": terms.tiles(shape, held.n_tokens, config),
        "activations": terms.activations(shape, min(held.n_tokens, config.prefill_chunk)),
        "logits": terms.logits(shape),
    }


def _device_prefix(shape: ModelShape, held: _Held, config: RetrievalConfig, near: int, target: Target) -> int:
    """Keys and values of the prefix that prefill keeps on the device, as many as the budget allows.

    Without a budget it is what is free less two tiles and a reserve for activations; none if that is not known.
    """
    budget = config.device_kv_budget
    if budget is None:
        two_tiles = 2 * config.prefill_tile * shape.row
        budget = 0 if target.memory is None else target.memory - near - two_tiles - reserve(config)
    return max(0, min(budget, shape.n_layers * shape.row * held.n_tokens))
