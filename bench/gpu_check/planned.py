"""What `retrieval-attn estimate` plans for a model that is here already, and what the plan leaves to prefill."""

import dataclasses
from typing import Any, NamedTuple

from retrieval_attn.attention.to_device import reserve
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.plan.plan import Base, Target, plan_phases
from retrieval_attn.plan.terms import CUDA_CONTEXT, ModelShape

PHASES = ("load", "prefill", "build", "decode")


class Planned(NamedTuple):
    """Bytes at the peak of a phase. device: of tensors, without what CUDA itself takes; 0 for a model on the CPU."""

    device: int
    host: int


def planned(model: Any, n_tokens: int, config: RetrievalConfig, device: str, libraries: int) -> dict[str, Planned]:
    """The plan of each of `PHASES`; libraries: bytes of the process without weights and text.

    The weights were made in place, so no checkpoint is mapped.
    """
    base = Base(libraries, weights=weight_bytes(model))
    phases = plan_phases(model.config, n_tokens, model.dtype, config, base, Target(device))
    return {
        phase.name: Planned(max(0, phase.device - CUDA_CONTEXT), phase.host) for phase in phases if phase.name in PHASES
    }


def budget_under(cap: int, model: Any, n_tokens: int, config: RetrievalConfig) -> int:
    """The `device_kv_budget` that fits a device of `cap` bytes beside all else that prefill plans, and the reserve.

    A cap on this process has to be given this way: what the driver says is free knows nothing of it.
    """
    streamed = planned(model, n_tokens, dataclasses.replace(config, device_kv_budget=0), "cuda", libraries=0)
    return max(0, allocatable(cap) - streamed["prefill"].device - reserve(config))


def allocatable(cap: int) -> int:
    """What a device of `cap` bytes has for tensors, once CUDA has taken its share."""
    return cap - CUDA_CONTEXT


def weight_bytes(model: Any) -> int:
    """As they are held; tied ones count once."""
    return sum(weight.nbytes for weight in model.parameters())


def kv_bytes_per_token(model: Any) -> int:
    """Of all layers, in the model's dtype."""
    shape = ModelShape.of(model.config, model.dtype)
    return shape.n_layers * shape.row
