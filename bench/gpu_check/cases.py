"""Which long prompts are read under a cap on device memory, and whether there is time and memory for one."""

import dataclasses
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM

from retrieval_attn.bench.gpu_check.end_to_end import prefill_seconds
from retrieval_attn.bench.gpu_check.planned import budget_under, kv_bytes_per_token, planned
from retrieval_attn.bench.shared.machine import copy_seconds, require_memory
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import chunk_ends

GIB = 1 << 30

# Keys that a token reads with vertical_slash of fixed sizes, to foresee how long a prefill takes.
SPARSE_KEYS = 7096


class CappedCase(NamedTuple):
    """One prompt, and how it is read.

    device_kv_budget: as in the config, but None is what fits under the cap. cap, decode_cap: bytes of the device that
    this process may take, until all indexes are built and from then on.
    """

    context: int
    prefill: str
    device_kv_budget: int | None = None
    decode_cap: int = 24 * GIB
    chunk: int = RetrievalConfig.prefill_chunk
    kv_dtype: str = "auto"
    cap: int = 24 * GIB

    @property
    def name(self) -> str:
        """What sets it apart."""
        kept = "keeps what fits" if self.device_kv_budget is None else "streams all"
        caps = " then ".join(f"{cap / GIB:g} GiB" for cap in dict.fromkeys((self.cap, self.decode_cap)))
        int8 = ", int8" if self.kv_dtype == "int8" else ""
        return f"{self.prefill}{int8}, {kept}, {caps}"


# The most telling first. Longer chunks at 512K: each brings everything before it to the device once more.
CASES = (
    CappedCase(1 << 17, "dense"),
    CappedCase(1 << 17, "dense", device_kv_budget=0, decode_cap=16 * GIB),
    CappedCase(1 << 19, "vertical_slash", device_kv_budget=0, chunk=1 << 15),
    CappedCase(1 << 17, "auto"),
    CappedCase(1 << 19, "vertical_slash", device_kv_budget=0, chunk=1 << 15, kv_dtype="int8"),
    CappedCase(1 << 19, "auto", chunk=1 << 13),
)


class Rates(NamedTuple):
    """What the machine can do, measured: operations per second, and bytes per second from CPU memory to the device."""

    flops: float
    link: float


def config_of(case: CappedCase, model: LlamaForCausalLM) -> RetrievalConfig:
    """With a scan: the graph of so many keys takes longer to build than all else here. The budget is a number."""
    config = RetrievalConfig(index="scan", prefill=case.prefill, prefill_chunk=case.chunk, kv_dtype=case.kv_dtype)
    budget = case.device_kv_budget
    if budget is None:
        budget = budget_under(case.cap, model, case.context, config)
    return dataclasses.replace(config, device_kv_budget=budget)


def why_skipped(
    case: CappedCase, model: LlamaForCausalLM, config: RetrievalConfig, rates: Rates, left: float
) -> str | None:
    """What a case lacks, time or CPU memory; None if neither. left: seconds left."""
    expected = _expected_seconds(case, model, config, rates)
    if expected > left:
        return f"prefill would take about {expected:.0f} s, {max(0, left):.0f} are left"
    plan = planned(model, case.context, config, str(model.device), libraries=0)
    try:
        require_memory(max(phase.host for phase in plan.values()) - plan["load"].host, "the context")
    except MemoryError as error:
        return str(error)
    return None


def _expected_seconds(case: CappedCase, model: LlamaForCausalLM, config: RetrievalConfig, rates: Rates) -> float:
    """Of prefill: its operations, and all that comes back from CPU memory, as if nothing were kept."""
    most_keys = SPARSE_KEYS if case.prefill == "vertical_slash" else None
    compute = prefill_seconds(model.config, case.context, rates.flops, most_keys)
    return compute + sum(chunk_ends(case.context, config)[:-1]) * kv_bytes_per_token(model) / rates.link


def link_bandwidth(device: str) -> float:
    """Bytes per second from ordinary CPU memory to the device; the best of a few."""
    source = torch.ones(1 << 26, dtype=torch.uint8)
    return source.nbytes / copy_seconds(source, torch.empty_like(source, device=device))
