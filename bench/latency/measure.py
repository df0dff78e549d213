"""Runs of `bench latency`: every context, layers alone or a whole model, and what is compared afterwards."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from retrieval_attn.bench.latency.options import RIVALS, Options
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.bars import StepBar, say
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, short, timed_line


def run(options: Options, progress: bool = False) -> dict[str, Any]:
    """Measure everything; returns {schema_version, bench, env, config, results, notes}, plain data.

    Raises ValueError for a device that is not there and for a model that cannot be loaded; what fails later is a row.
    """
    device, used_threads = machine.prepare(options.device, options.config.threads)
    options = replace(options, device=device)
    env = machine.describe(used_threads)
    env["copy_bandwidth_bytes_per_s"] = bandwidth = machine.copy_bandwidth("cpu")
    if options.device != "cpu":
        env["device_copy_bandwidth_bytes_per_s"] = machine.copy_bandwidth(options.device)
    rows = []
    for row in _rows(options, progress):
        rows.append(row)
        if not progress:
            say(timed_line(row))
    _compare(rows)
    for row in rows:
        if row["gb_per_s"] is not None:
            on_device = row["method"] in RIVALS and options.device != "cpu"
            limit = env["device_copy_bandwidth_bytes_per_s"] if on_device else bandwidth
            row["bandwidth_share"] = row["gb_per_s"] * 1e9 / limit
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": "latency",
        "env": env,
        "config": options.as_dict(),
        "results": rows,
        "notes": _notes(options, env, rows),
    }


def _rows(options: Options, progress: bool) -> Iterator[Row]:
    """The rows, with a bar on stderr while they are made."""
    with StepBar(_n_steps(options), progress) as bar:
        if options.mode == "model":
            from retrieval_attn.bench.latency.measure_model import measure_model

            yield from measure_model(options, bar.advance)
            return
        from retrieval_attn.bench.latency.measure_layer import measure_context

        for context in options.contexts:
            yield from measure_context(options, context, bar.advance)


def _n_steps(options: Options) -> int:
    """One per method and turn, and those that prepare them."""
    turns = options.repeat + (min(1, options.warmup) if options.mode == "model" else options.warmup)
    per_context = len(options.methods) * turns
    if options.mode == "layer":
        per_context += options.layers + len(options.methods)
    return per_context * len(options.contexts) + (options.mode == "model")


def _compare(rows: list[Row]) -> None:
    """Fill in the speed-ups against the rivals of the same context."""
    times = {(row["context"], row["method"]): row["total_ms"] for row in rows if row["status"] == "ok"}
    for row in rows:
        for rival in RIVALS:
            theirs = times.get((row["context"], rival))
            if theirs and row["status"] == "ok":
                row[f"speedup_vs_{rival}"] = theirs / row["total_ms"]


def _notes(options: Options, env: dict[str, Any], rows: list[Row]) -> list[str]:
    """The foot of the table: what was measured, on what, and what bounds each method."""
    notes = [
        machine_note(env),
        f"memory copies at {env['copy_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s (reads and writes together)"
        + (f"; {env['gpu']}, driver {env['gpu_driver']}" if env["gpu"] else ""),
    ]
    return notes + (_model_notes(options) if options.mode == "model" else _layer_notes(options, env, rows))


def _model_notes(options: Options) -> list[str]:
    return [
        f"ms: one token of the whole model, median of {options.gen} tokens x {options.repeat} runs; generated prose, "
        "no stop tokens; near, search, gather and merge: sums over layers, rest: everything else of the model",
        "full: the same weights in stock transformers (sdpa, DynamicCache); folded: its decode attention with the head "
        "group folded into the query axis",
        "logit error: relative L2 distance of the logits from those of full, for the same tokens",
    ]


def _layer_notes(options: Options, env: dict[str, Any], rows: list[Row]) -> list[str]:
    swept = 2 * env["last_level_cache_bytes"] / 2**20
    cold = f"caches are cold: {swept:.0f} MiB of other memory are read and written before each step"
    notes = [
        f"ms: one step of one layer of {options.layers}, median of {options.gen} steps x {options.repeat} repeats, the "
        "methods in turn on the same fresh queries; rest is appending, to the index too, and bookkeeping",
        cold if options.device == "cpu" else "caches are as the steps before leave them",
        "no prefill is run: TTFT, prefill and TPOT are those of a model (--shape embedded or --model)",
        "full: the sdpa attention function of stock transformers; what its cache costs (one copy of all keys and "
        "values per step) is not counted; folded: the same sdpa, head group folded into the query axis",
        "rel. error: against float32 attention over all tokens; each output was first checked against attention over "
        "the tokens it selected"
        if options.check
        else "outputs were not checked: do not quote these numbers",
    ]
    longest = max((row["context"] for row in rows if row["gb_per_s"] is not None), default=None)
    notes += [_bound(row) for row in rows if row["context"] == longest and row["gb_per_s"] is not None]
    return notes


def _bound(row: Row) -> str:
    least = row["total_ms"] * row["bandwidth_share"]
    share = 100 * row["bandwidth_share"]
    return (
        f"bound of {row['method']} at {short(row['context'])}: {row['bytes_per_step'] / 2**20:.1f} MiB per step and "
        f"layer, {least:.3f} ms at the speed of a copy; took {row['total_ms']:.3f} ms, {share:.0f} % of that speed"
    )
