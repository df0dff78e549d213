"""The plan of memory for a model that is not loaded, and how it compares with what this machine has free."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.generate import UNBOUNDED, Request, longest_context
from retrieval_attn.hf.attention import NAME, register
from retrieval_attn.hf.auto_class import auto_class
from retrieval_attn.hf.cache import RetrievalCache, prefill_patterns
from retrieval_attn.hf.checkpoint import find_checkpoint, read_config
from retrieval_attn.hf.weights import asked_dtype, check_weights, gguf_dtype
from retrieval_attn.kv.address_space import OUT_OF_MEMORY
from retrieval_attn.llm import EMBEDDED
from retrieval_attn.plan.plan import GIB, Base, Phase, Target, plan_phases

# Bytes per weight of a linear layer as bitsandbytes keeps it: int8 (one float32 per row comes on top), or 4 bits and
# one float32 per 64 weights.
QUANTISED = {"int8": 1.0, "int4": 0.5 + 4 / 64}

# What a process runs to find out what its libraries take.
_TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


@dataclass(frozen=True)
class Estimate:
    """The plan for one length of context. Bytes; `fits` is what `verdict` says in words.

    max_tokens: the longest context that the model, or a limit of the user, allows. device_free: None where there
    is nothing to compare.
    """

    n_tokens: int
    max_tokens: int
    phases: tuple[Phase, ...]
    host_free: int
    device_free: int | None

    @property
    def host(self) -> int:
        """The peak in CPU memory."""
        return max(phase.host for phase in self.phases)

    @property
    def device(self) -> int:
        """The peak on a CUDA device; 0 if the model runs on the CPU."""
        return max(phase.device for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether both peaks lie within what is free."""
        return self.host <= self.host_free and (self.device_free is None or self.device <= self.device_free)

    @property
    def verdict(self) -> str:
        """One line: whether it fits, the peaks, what is free, and what to do if it does not fit."""
        parts = [f"CPU memory {_gib(self.host)} of {_gib(self.host_free)} free"]
        if self.device and self.device_free is not None:
            parts.append(f"device {_gib(self.device)} of {_gib(self.device_free)}")
        elif self.device:
            parts.append(f"device {_gib(self.device)}, to compare with --device-memory")
        said = f"{'fits' if self.fits else 'does not fit'}: {'; '.join(parts)}"
        if self.host > self.host_free:
            said += f"; {OUT_OF_MEMORY}"
        if self.device_free is not None and self.device > self.device_free:
            said += "; use --weights int8 or int4, or a smaller --device-kv-budget"
        if self.n_tokens > self.max_tokens:
            said += f"; longer than the {self.max_tokens} tokens that the model, or a limit, allows"
        if self.max_tokens >= UNBOUNDED:
            said += "; its config does not say how long a text the model was made for"
        return said

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        phases = [{**asdict(phase), "host": phase.host, "device": phase.device} for phase in self.phases]
        peaks = {"peak_host": self.host, "peak_device": self.device, "fits": self.fits, "verdict": self.verdict}
        return {**asdict(self), "phases": phases, **peaks}


def estimate_memory(
    model: str | Path | None,
    contexts: Sequence[int],
    config: RetrievalConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    device_memory: int | None = None,
    host_memory: int | None = None,
    rope: str | None = None,
) -> list[Estimate]:
    """What contexts of these lengths take, from the model's config alone: no weights are read.

    model, dtype, weights, rope: as `load` takes them. device: "auto", "cpu" or "cuda", the latter also on a machine
    without.
    device_memory: bytes of the device, whole; None takes what the device here has free.
    host_memory: bytes of CPU memory that the process may take; None takes what is free here.

    Raises FileNotFoundError or ValueError as `load` does, and ValueError for a config that does not tell its dtype.
    """
    checkpoint = find_checkpoint(EMBEDDED if model is None else model)
    check_weights(checkpoint, weights)
    found = read_config(checkpoint, rope)
    prefill_patterns(found, config)
    target = _target(device, device_memory, host_memory)
    header = checkpoint.header
    stored = gguf_dtype(target.device) if header else _stored_dtype(found)
    numbers = _wanted_dtype(dtype, weights, stored)
    base = Base(
        libraries=measure_libraries(config, numbers),
        weights=weight_bytes(found, numbers, weights),
        checkpoint=header.n_bytes if header else weight_bytes(found, stored or numbers, "auto"),
    )
    # This process holds the libraries already, and so will the one that is planned.
    here = psutil.virtual_memory().available + base.libraries
    return [
        Estimate(
            n_tokens=n,
            max_tokens=longest_context(found, config, numbers),
            phases=plan_phases(found, n, numbers, config, base, target),
            host_free=here if host_memory is None else host_memory,
            device_free=target.memory,
        )
        for n in contexts
    ]


def _target(device: str, memory: int | None, host_memory: int | None) -> Target:
    """The machine that is planned for; the device's memory as given, or else what is free on one that is here."""
    here = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    chosen = ("cuda" if here else "cpu") if device == "auto" else device
    if memory is not None and chosen == "cpu":
        raise ValueError(f"device_memory is of a CUDA device, got {memory} with device {chosen!r}; use device='cuda'")
    if chosen == "cuda" and memory is None and here:
        memory = torch.cuda.mem_get_info()[0]
    return Target(chosen, memory, host_memory)


def _stored_dtype(model_config: Any) -> torch.dtype | None:
    """The dtype that the config names, on whichever of its levels."""
    text = model_config.get_text_config(decoder=True)
    named = getattr(model_config, "dtype", None) or getattr(text, "dtype", None)
    return getattr(torch, named) if isinstance(named, str) else named


def _wanted_dtype(dtype: str, weights: str, stored: torch.dtype | None) -> torch.dtype:
    name = asked_dtype(weights, dtype)
    if name != "auto":
        return getattr(torch, name)
    if stored is None:
        raise ValueError("dtype must be given, as 'bfloat16': the model's config does not name one")
    return stored


def weight_bytes(model_config: Any, dtype: torch.dtype, weights: str = "auto") -> int:
    """Bytes of a model's weights, counted on a model without any; tied ones once.

    weights "int8" and "int4" make the linear layers smaller, the one that gives the logits excepted.
    """
    with torch.device("meta"):
        model = auto_class(model_config).from_config(model_config)
    total = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if weights not in QUANTISED:
        return total
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return total - round(linear * (dtype.itemsize - QUANTISED[weights]))


def measure_libraries(config: RetrievalConfig, dtype: torch.dtype) -> int:
    """Bytes of this process once all is imported and compiled, and a model too small to count has answered.

    Much of what libraries take is code that is read from disk when it runs first.
    """
    register()
    torch_state = torch.get_rng_state()
    with torch.no_grad():
        model = LlamaForCausalLM(_TINY).to(dtype).eval()
    torch.set_rng_state(torch_state)
    model.set_attn_implementation(NAME)
    small = RetrievalConfig(
        index=config.index,
        estimator=config.estimator,
        exact_below=0,
        n_sink=1,
        n_local=16,
        build_queries=16,
        threads=config.threads,
    )
    request = Request(model, RetrievalCache(model.config, small), Sampling(max_new_tokens=3), ())
    for _ in request.tokens(list(range(512))):
        pass
    return psutil.Process().memory_info().rss


def as_table(estimates: Sequence[Estimate]) -> Table:
    """A row per phase, and per context what is held in CPU memory and, if there is one, on the device."""
    table = Table("phase")
    on_device = any(estimate.device for estimate in estimates)
    for estimate in estimates:
        table.add_column(f"{estimate.n_tokens:,}: CPU memory", justify="right")
        if on_device:
            table.add_column("device", justify="right")
    for phases in zip(*(estimate.phases for estimate in estimates), strict=True):
        sizes = [(_gib(phase.host), _gib(phase.device)) if on_device else (_gib(phase.host),) for phase in phases]
        table.add_row(phases[0].name, *(cell for pair in sizes for cell in pair))
    return table


def as_lines(estimate: Estimate) -> list[str]:
    """What the peaks of one context are made of, and the verdict."""
    fullest = max(estimate.phases, key=lambda phase: phase.host)
    lines = [f"{estimate.n_tokens:,} tokens: {estimate.verdict}"]
    lines.append(f"    CPU memory in {fullest.name}: {_largest(fullest.host_terms)}")
    if estimate.device:
        fullest = max(estimate.phases, key=lambda phase: phase.device)
        lines.append(f"    device in {fullest.name}: {_largest(fullest.device_terms)}")
    return lines


def _largest(parts: Mapping[str, int]) -> str:
    """The parts, largest first, without those too small to show."""
    shown = [(n_bytes, name) for name, n_bytes in parts.items() if n_bytes >= GIB // 200]
    return ", ".join(f"{name} {_gib(n_bytes)}" for n_bytes, name in sorted(shown, reverse=True))


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
