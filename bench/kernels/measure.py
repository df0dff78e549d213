"""Runs of `bench kernels`: a prompt of every length, and the kernels of decode and build beside it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from retrieval_attn.bench.kernels.measure_prompt import Plan, measure_prompt, require_room
from retrieval_attn.bench.kernels.measure_steps import CALLS, measure_steps
from retrieval_attn.bench.kernels.options import Options
from retrieval_attn.bench.kernels.rows import Limits, blank_row, compare
from retrieval_attn.bench.kernels.timing import peak_flops
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.bars import Status
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, timed_line
from retrieval_attn.bench.vectors.prefill import prefill_vectors


def run(options: Options, shown: bool = False) -> dict[str, Any]:
    """Measure everything; returns {schema_version, bench, env, config, results, notes}, plain data.

    Raises ValueError for a device that is not there; what fails later is a row.
    """
    device, used_threads = machine.prepare(options.device, options.threads)
    options = replace(options, device=device)
    env = machine.describe(used_threads)
    limits = Limits(peak_flops(options.device, getattr(torch, options.dtype)), machine.copy_bandwidth(options.device))
    env["matmul_flops_per_s"], env["copy_bandwidth_bytes_per_s"] = limits
    rows: list[Row] = []
    with Status(shown) as status:
        plan = Plan(options.patterns, options.mass, options.chunk, options.repeat, options.device, limits, status.doing)
        for row in _rows(options, plan):
            rows.append(row)
            status.finished(timed_line(row))
    compare(rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": "kernels",
        "env": env,
        "config": options.as_dict(),
        "results": rows,
        "notes": notes(options, env),
    }


def _rows(options: Options, plan: "Plan") -> Iterator[Row]:
    """Every row, as it is measured. The window and the merge do not depend on the length: they come once."""

    dtype, done = getattr(torch, options.dtype), False
    H, G, D = options.shape
    for length in options.lengths:
        plan.advance(f"{length} tokens, vectors")
        row = blank_row(length, "vectors")
        with Failing(row):
            require_room(length, H, G, D, dtype.itemsize)
            prompt = prefill_vectors(options.source, S=length, seed=options.seed, H=H, G=G, D=D, dtype=dtype)
            yield from measure_prompt(plan, prompt)
            yield from measure_steps(plan, prompt, () if done else options.steps)
            done = True
        if row["reason"]:
            yield row


def notes(options: Options, env: dict[str, Any]) -> list[str]:
    """The foot of the table: what was measured, on what."""

    peak, copied = env["matmul_flops_per_s"], env["copy_bandwidth_bytes_per_s"]
    return [
        machine_note(env),
        f"peak: {peak / 1e12:.2f} TFLOP/s in a {options.dtype} matrix product; copies at {copied / 1e9:.1f} GB/s "
        "(reads and writes together)" + (f"; {env['gpu']}, driver {env['gpu_driver']}" if env["gpu"] else ""),
        f"ms of prefill: a whole prompt of one layer in chunks of {options.chunk} queries; of more than four chunks, "
        "those at 1/4, 1/2, 3/4 and the end are timed, and the others lie on straight lines between and beyond; median "
        f"of {options.repeat} turns, the kernels in turn on the same chunk; choosing what to read is in the time",
        "sdpa: PyTorch's, with causal_lower_right where a chunk has a past, key heads repeated before; dense: the same "
        "library kernels without a mask, square and past merged; one call: the whole prompt, is_causal, no chunks",
        f"auto and mass_vertical_slash keep a mass of {options.mass}, as a root mean square; the others have the sizes "
        "of MInference's paper (arXiv 2407.02490)",
        "density: share of the causal pairs that are read; of auto as its choices say, else counted; mass: share of "
        "the softmax that was read, and rel. error against float32, both over 32 queries a chunk and all heads",
        "TFLOP/s: of what the kernel reads; GB/s: of what a call must move at least",
        f"near: one query, the window of decode, {CALLS} calls in a row, x sdpa with the head group folded; "
        "caches are warm",
    ]
