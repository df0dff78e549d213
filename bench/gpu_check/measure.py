"""The four parts of the GPU check, one after the other, each within its share of the time."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from retrieval_attn.bench.gpu_check import capped as gpu_capped
from retrieval_attn.bench.gpu_check import cases as gpu_cases
from retrieval_attn.bench.gpu_check import correct as gpu_correct
from retrieval_attn.bench.gpu_check import end_to_end as gpu_end_to_end
from retrieval_attn.bench.gpu_check import streamed as gpu_streamed
from retrieval_attn.bench.kernels.measure_prompt import Plan, measure_prompt
from retrieval_attn.bench.kernels.measure_steps import measure_steps
from retrieval_attn.bench.kernels.options import PATTERNS, STEPS
from retrieval_attn.bench.kernels.rows import Limits, blank_row, compare
from retrieval_attn.bench.kernels.timing import peak_flops
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, short
from retrieval_attn.bench.vectors.prefill import Prompt, prefill_vectors
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.kernels.sparse.lists import HEAD_DIMS

# Shares of the time; what a part leaves over, the next ones have.
SHARES = {"correctness": 0.2, gpu_capped.PART: 0.5, "end to end": 0.1, "prefill": 0.2}

MASS = RetrievalConfig.prefill_mass


class Sizes(NamedTuple):
    """What is measured. made: query and KV heads whose vectors are made; they are repeated until there are H and G.
    head_dims: of correctness; None means all."""

    lengths: tuple[int, ...]
    H: int
    G: int
    D: int
    made: tuple[int, int]
    chunk: int
    repeat: int
    dtype: torch.dtype
    head_dims: tuple[int, ...] | None
    model: dict[str, Any]
    prompts: tuple[int, ...]
    capped: tuple[gpu_cases.CappedCase, ...]


BIG = Sizes(
    lengths=tuple(1 << n for n in (13, 14, 15, 16, 17, 18, 20)), H=32, G=8, D=128, made=(4, 1), chunk=8192, repeat=5,
    dtype=torch.bfloat16, head_dims=None, model=gpu_end_to_end.LLAMA_8B, prompts=(1 << 15, 1 << 17),
    capped=gpu_cases.CASES,
)  # fmt: skip

TINY = Sizes(
    lengths=(1024, 1536), H=4, G=2, D=64, made=(2, 1), chunk=512, repeat=1, dtype=torch.float32, head_dims=(64,),
    model={
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 8192,
    },
    prompts=(1200,),
    capped=tuple(case._replace(context=3000, chunk=1024) for case in gpu_cases.CASES),
)  # fmt: skip


class Budget:
    """Seconds left for each part of `SHARES`, which come in that order."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun, self._all = clock, clock(), 60 * minutes

    def left(self, part: str) -> float:
        """Seconds until the end of the part's share; what went before may have left it more, or nothing."""
        parts = list(SHARES)
        until = sum(SHARES[name] for name in parts[: parts.index(part) + 1])
        return self._begun + until * self._all - self._clock()


def run(sizes: Sizes, device: str, minutes: float, seed: int) -> dict[str, Any]:
    """All parts; prints a line per row. Returns {schema_version, bench, env, config, results, notes}, plain data."""
    budget, env = Budget(minutes), machine.describe(torch.get_num_threads())
    limits = Limits(peak_flops(device, sizes.dtype), machine.copy_bandwidth(device))
    env["matmul_flops_per_s"], env["copy_bandwidth_bytes_per_s"] = limits
    print(f"{env['gpu'] or env['cpu']}: {limits.flops / 1e12:.2f} TFLOP/s, copies at {limits.bandwidth / 1e9:.0f} GB/s")
    rows = list(_correctness(sizes, device, seed, budget))
    rows += _with_model(sizes, device, limits, seed, budget)
    timed = []
    for row in _prefill(sizes, device, limits, seed, budget):
        timed.append(row)
        print(_describe(row), flush=True)
    compare(timed)
    for row in timed:
        if row["speedup_vs_best_dense"]:
            print(f"{short(row['context']):>8} {row['method']}: {row['speedup_vs_best_dense']:.2f} x the best dense")
    config = {**sizes._asdict(), "dtype": str(sizes.dtype).removeprefix("torch."), "device": device, "seed": seed}
    config["capped"] = [case._asdict() for case in sizes.capped]
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": "gpu_check",
        "env": env,
        "config": {**config, "minutes": minutes, "mass": MASS, "mode": "gpu check"},
        "results": rows + timed,
        "notes": _notes(sizes),
    }


def _correctness(sizes: Sizes, device: str, seed: int, budget: Budget) -> Iterator[Row]:
    chosen = gpu_streamed.cases(device, seed)
    chosen += gpu_correct.cases(device, seed, sizes.head_dims or HEAD_DIMS)
    for row in gpu_correct.check_all(chosen, lambda: budget.left("correctness")):
        print(gpu_correct.describe(row), flush=True)
        yield row


def _with_model(sizes: Sizes, device: str, limits: Limits, seed: int, budget: Budget) -> list[Row]:
    """The model is gone when this returns, and its memory is free for longer prompts."""
    rows: list[Row] = []
    failed: Row = {"part": "end to end", "method": "model", "status": "failed", "reason": None}
    with Failing(failed):
        make = lambda: gpu_end_to_end.random_model(sizes.model, device, sizes.dtype, seed)  # noqa: E731
        loaded = gpu_capped.load(make, device, sizes.capped)
        for describe, row in _of_model(loaded, sizes, device, limits, budget):
            rows.append(row)
            print(describe(row), flush=True)
        del loaded
    if device != "cpu":
        torch.cuda.empty_cache()
    return [*rows, failed] if failed["reason"] else rows


def _of_model(
    loaded: gpu_capped.Loaded, sizes: Sizes, device: str, limits: Limits, budget: Budget
) -> Iterator[tuple[Callable[[Row], str], Row]]:
    """Rows, each with what writes its line."""
    rates = gpu_cases.Rates(limits.flops, gpu_cases.link_bandwidth(device))
    left = lambda: budget.left(gpu_capped.PART)  # noqa: E731
    for row in gpu_capped.measure(loaded, sizes.capped, device, rates, left):
        yield gpu_capped.describe, row
    left = lambda: budget.left("end to end")  # noqa: E731
    for row in gpu_end_to_end.measure_model(loaded.model, sizes.prompts, device, limits.flops, left):
        yield gpu_end_to_end.describe, row


def _prefill(sizes: Sizes, device: str, limits: Limits, seed: int, budget: Budget) -> Iterator[Row]:
    """Length by length, while there is time: a longer one is taken to cost as many times more as it is longer."""
    plan = Plan(PATTERNS, MASS, sizes.chunk, sizes.repeat, device, limits, lambda what: None)
    before, taken = 1, 0.0
    for length in sizes.lengths:
        started, row = time.monotonic(), blank_row(length, "all methods")
        expected = taken * length / before
        if expected > budget.left("prefill"):
            row |= {"status": "skipped", "reason": f"it would take about {expected:.0f} s, which are not left"}
            yield row
            continue
        with Failing(row):
            prompt = _repeated(sizes, length, seed)
            yield from measure_prompt(plan, prompt)
            yield from measure_steps(plan, prompt, STEPS if length == sizes.lengths[0] else STEPS[2:])
        if row["reason"]:
            yield row
        if device != "cpu":
            torch.cuda.empty_cache()
        before, taken = length, time.monotonic() - started


def _repeated(sizes: Sizes, length: int, seed: int) -> Prompt:
    """Some groups of heads, again and again: making them all would take longer than measuring them."""
    H, G = sizes.made
    made = prefill_vectors("shaped_mixed", S=length, seed=seed, H=H, G=G, D=sizes.D, dtype=sizes.dtype)
    return Prompt(*(x.repeat(1, sizes.H // H, 1, 1) for x in made))


def _describe(row: Row) -> str:
    what = f"{short(row['context']):>8} {row['method']}"
    if row["status"] != "ok":
        return f"{row['status']:8}{what}: {row['reason']}"
    return (
        f"{'ok':8}{what}: {row['total_ms']:.3f} ms, {100 * row['peak_share']:.0f} % of peak, "
        f"{100 * row['bandwidth_share']:.0f} % of copy"
        + (f", density {row['density']:.3f}" if row["density"] is not None else "")
        + f", error {row['rel_error']:.1e}"
    )


def _notes(sizes: Sizes) -> list[str]:
    H, G = sizes.made
    return [
        "correctness: largest error against float64, and what is allowed: twice that of the same mathematics with "
        "every step rounded to the dtype",
        f"prefill: one layer, {sizes.H} query heads over {sizes.G} KV heads, in chunks of {sizes.chunk} queries; of "
        "more than four, those at 1/4, 1/2, 3/4 and the end are timed, and the others lie on straight lines; "
        f"vectors of {H} heads over {G} are repeated for the others",
        "end to end: random weights, whose attention is flat; auto is judged by what it costs there, vertical_slash of "
        "fixed sizes reads the same in any model; stock: transformers with sdpa, in one pass",
        f"{gpu_capped.PART}: the same weights, an index of kind scan; bytes of the device are of tensors, largest "
        "allocated and largest reserved, without CUDA's own; host bytes are of the whole process; ratios are of "
        "what was measured to the plan of retrieval-attn estimate",
        "shares of peak and of copy: of a matrix product and of a large copy on this device, in this run",
    ]
