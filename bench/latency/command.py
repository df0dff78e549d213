"""`retrieval-attn bench latency`: decode latency against context length, beside stock attention in the same run."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer

from retrieval_attn.bench.latency import format as latency_format
from retrieval_attn.bench.latency.options import RIVALS, Asked, Options, make_options
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.options import ReportTo
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, short
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, with_options


@with_options
def command(
    asked: Asked,
    config: Annotated[RetrievalConfig, Fields("top_k", "estimator", "threads", "seed", exact_below=0)],
    to: ReportTo,
) -> None:
    """Decode latency of retrieval and of stock attention, per context length.

    With --shape llama3-8b or H,G,D attention layers alone are timed on synthetic vectors; with --shape embedded or
    --model the whole model, from prompt to last token. A cell that fails is a row that says why.
    """
    options = make_options(asked, config)
    report = run(options, progress=sys.stderr.isatty())
    sys.stdout.write(latency_format.render(report, to.form))
    if to.out is not None:
        to.out.write_text(latency_format.render(report, "json"))
    if to.plot is not None:
        latency_format.plot(report, to.plot)
    if not any(row["status"] == "ok" for row in report["results"]):
        raise typer.Exit(1)


def run(options: Options, progress: bool = False) -> dict[str, Any]:
    """Measure everything; returns {schema_version, env, config, results, notes}, plain data.

    Raises ValueError for a device that is not there and for a model that cannot be loaded; what fails later is a row.
    """
    from retrieval_attn.bench.shared import machine

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
            _tell(row)
    _compare(rows)
    for row in rows:
        if row["gb_per_s"] is not None:
            on_device = row["method"] in RIVALS and options.device != "cpu"
            limit = env["device_copy_bandwidth_bytes_per_s"] if on_device else bandwidth
            row["bandwidth_share"] = row["gb_per_s"] * 1e9 / limit
    return {
        "schema_version": SCHEMA_VERSION,
        "env": env,
        "config": options.as_dict(),
        "results": rows,
        "notes": _notes(options, env, rows),
    }


def _rows(options: Options, progress: bool) -> Iterator[Row]:
    """The rows, with a bar on stderr while they are made."""
    with _Bar(options, progress) as bar:
        if options.mode == "model":
            from retrieval_attn.bench.latency.model import measure_model

            yield from measure_model(options, bar.advance)
            return
        from retrieval_attn.bench.latency.layer import measure_context

        for context in options.contexts:
            yield from measure_context(options, context, bar.advance)


def _tell(row: Row) -> None:
    """A line on stderr per finished row, for logs, where there is no bar."""
    said = f"{row['total_ms']:.3f} ms" if row["status"] == "ok" else row["reason"]
    print(f"{short(row['context'])} {row['method']}: {row['status']}, {said}", file=sys.stderr, flush=True)


class _Bar:
    """Progress on stderr with the time left: one unit per method and turn, and what is being done."""

    def __init__(self, options: Options, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
        turns = options.repeat + (min(1, options.warmup) if options.mode == "model" else options.warmup)
        per_context = len(options.methods) * turns
        if options.mode == "layer":
            per_context += options.layers + len(options.methods)
        self._n_left = per_context * len(options.contexts) + (options.mode == "model")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        self._task = self._progress.add_task("", total=self._n_left)
        self._begun = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, what: str) -> None:
        """The last thing is done and `what` begins."""
        self._progress.update(self._task, advance=1 if self._begun else 0, description=what)
        self._begun = True


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
        "the tokens it selected" if options.check else "outputs were not checked: do not quote these numbers",
    ]  # fmt: skip
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
