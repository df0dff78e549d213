"""Long contexts on a small card: a model of the shape of Llama 3 8B, this process held to 24 or 16 GiB of the device.

Per phase the peaks of device and CPU memory beside the plan of `retrieval-attn estimate`; the time to the first token,
and that of the later ones.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import psutil
import torch
from transformers import LlamaForCausalLM

import retrieval_attn
from retrieval_attn.bench.gpu_check.cases import GIB, CappedCase, Rates, config_of, why_skipped
from retrieval_attn.bench.gpu_check.end_to_end import random_ids
from retrieval_attn.bench.gpu_check.planned import Planned, allocatable, planned, weight_bytes
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.machine import PeakMemory, synchronize
from retrieval_attn.bench.shared.report import Row, short
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.generate import Request, follow_builds

PART = "under a cap"

# Later tokens that are timed, and those before them that are not.
STEPS, WARM_STEPS = 64, 4

# Of the prompt that is read first, for kernels to be compiled: more than is scanned without an index.
WARM_TOKENS = 4096


class Loaded(NamedTuple):
    """A model, and what the phase "load" took, beside its plan."""

    model: LlamaForCausalLM
    load: Row


def load(make: Callable[[], LlamaForCausalLM], device: str, cases: tuple[CappedCase, ...]) -> Loaded:
    """Make the model under the smallest cap of all cases."""
    before = _resident_bytes()
    phases: Row = {}
    with capped(device, min((case.cap for case in cases), default=24 * GIB)), _phase(phases, "load", device):
        model = make()
    plan = planned(model, 1, RetrievalConfig(), device, before)
    return Loaded(model, phases["load"] | _beside(phases["load"], plan["load"]))


def measure(
    loaded: Loaded, cases: tuple[CappedCase, ...], device: str, rates: Rates, left: Callable[[], float]
) -> Iterator[Row]:
    """A row per case; "skipped" where time or CPU memory would not suffice. left: seconds left.

    Want of memory on the way is a row, too, with the phase it came in.
    """
    retrieval_attn.register()
    loaded.model.set_attn_implementation("retrieval")
    for case in cases:
        config = config_of(case, loaded.model)
        row = _blank(case) | {"device_kv_budget": config.device_kv_budget}
        reason = why_skipped(case, loaded.model, config, rates, left())
        if reason:
            row |= {"status": "skipped", "reason": reason}
        else:
            _try(loaded, case, config, device, row)
        gc.collect()
        yield row


@contextmanager
def capped(device: str, n_bytes: int) -> Iterator[None]:
    """Inside, tensors of this process take no more than a device of so many bytes would have for them."""
    if device == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allocatable(n_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _blank(case: CappedCase) -> Row:
    row: Row = {"part": PART, "method": case.name, "status": "failed", "reason": None, **case._asdict()}
    found = ("ttft_s", "build_s", "token_ms", "token_p20_ms", "token_p80_ms", "read", "visited", "index")
    return row | dict.fromkeys(found) | {"phases": {}}


def _try(loaded: Loaded, case: CappedCase, config: RetrievalConfig, device: str, row: Row) -> None:
    """Fill in the row, or say why not; a short prompt comes first, so that nothing is compiled in what is measured."""
    model, phases = loaded.model, row["phases"]
    with Failing(row):
        _run(model, case._replace(context=min(WARM_TOKENS, case.context)), config, device, {"phases": {}})
        gc.collect()
        held = weight_bytes(model) if device == "cpu" else 0
        plan = planned(model, case.context, config, device, libraries=_resident_bytes() - held)
        try:
            _run(model, case, config, device, row)
        finally:
            for name, took in phases.items():
                took |= _beside(took, plan[name])
        row["status"] = "ok"
    if row["status"] != "ok":
        wanting = "out of memory: " if row["status"] == "oom" else ""
        row |= {"status": "failed", "reason": f"{next(reversed(phases), 'warm-up')}: {wanting}{row['reason']}"}
    row["phases"] = {"load": dict(loaded.load)} | phases


def _run(model: LlamaForCausalLM, case: CappedCase, config: RetrievalConfig, device: str, row: Row) -> None:
    """Read the prompt, build, decode, and note what it took."""
    cache = retrieval_attn.RetrievalCache(model.config, config)
    request = Request(model, cache, Sampling(max_new_tokens=1 + WARM_STEPS + STEPS), ())
    tokens = request.tokens(random_ids(model, case.context)[0].tolist())
    try:
        with capped(device, case.cap):
            with _phase(row["phases"], "prefill", device):
                next(tokens)
            with _phase(row["phases"], "build", device):
                follow_builds(cache, lambda progress: None)
        with capped(device, case.decode_cap), _phase(row["phases"], "decode", device):
            for _ in tokens:
                pass
    finally:
        tokens.close()
        cache.cancel_builds()
    _note(request, row)


def _note(request: Request, row: Row) -> None:
    stats = request.stats
    milliseconds = 1e3 * np.array(stats.itl_s[WARM_STEPS:])
    low, middle, high = np.percentile(milliseconds, [20, 50, 80]).tolist()
    row |= {"token_ms": middle, "token_p20_ms": low, "token_p80_ms": high}
    row |= {"ttft_s": stats.ttft_s, "build_s": row["phases"]["build"]["seconds"]}
    row |= {"read": stats.prefill_read, "visited": stats.visited_fraction, "index": stats.index}


@contextmanager
def _phase(phases: Row, name: str, device: str) -> Iterator[None]:
    """Inside is this phase; what it took is noted even if it fails."""
    memory, started = PeakMemory(device), time.perf_counter()
    phases[name] = {}
    try:
        with memory:
            yield
            synchronize(device)
    finally:
        reserved = torch.cuda.max_memory_reserved() if device != "cpu" else None
        phases[name] |= {"seconds": time.perf_counter() - started, "device_bytes": memory.device or None}
        phases[name] |= {"reserved_bytes": reserved, "host_bytes": memory.rss}


def _beside(took: Row, plan: Planned) -> Row:
    """The plan of a phase, and how many times it what was measured is."""
    device = took["device_bytes"]
    return {
        "planned_device_bytes": plan.device or None,
        "planned_host_bytes": plan.host,
        "device_ratio": device / plan.device if device and plan.device else None,
        "host_ratio": took["host_bytes"] / plan.host,
    }


def describe(row: Row) -> str:
    """One line of the log; the ratios are of what was measured to what was planned."""
    what = f"{short(row['context']):>8} {row['method']}"
    if row["status"] != "ok":
        return f"{row['status']:8}{what}: {row['reason']}"
    where = "host" if row["phases"]["decode"]["device_bytes"] is None else "device"
    peaks = ", ".join(
        f"{name} {took[f'{where}_bytes'] / GIB:.2f} GiB (x {took[f'{where}_ratio']:.2f})"
        for name, took in row["phases"].items()
    )
    return f"{'ok':8}{what}: {row['ttft_s']:.1f} s to the first token, {row['token_ms']:.1f} ms each; {where}: {peaks}"


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss
