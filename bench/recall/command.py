"""`retrieval-attn bench recall`: what every index finds, for which time and bytes, on real and made-up vectors."""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.recall.options import Asked, Options, make_options
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.options import Form, choose
from retrieval_attn.bench.shared.pictures import require_matplotlib
from retrieval_attn.bench.shared.report import FORMATS, SCHEMA_VERSION, Row, check_writable, short
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, option, with_options


@with_options
def command(
    asked: Asked,
    config: Annotated[RetrievalConfig, Fields("top_k", "threads", rest=False)],
    form: Form = "md",
    out: Annotated[Path | None, option("Also write the report to this file: .json, .md or .csv.", "--out")] = None,
    plot: Annotated[Path | None, option("Also draw a picture per source into this folder.", "--plot")] = None,
) -> None:
    """Recall, recovered mass, output error, bytes and time of one layer's search, for every method and effort.

    Each held-out query is searched alone, for all heads of a layer, with cold caches. Ctrl-C ends the run and keeps
    what was measured. A method that fails is a row that says why.
    """
    choose(form, FORMATS, "--output")
    options = make_options(asked, config)
    _check_files(out, plot)
    if asked.capture is not None and not asked.capture.exists():
        check_writable(asked.capture, "--capture")
    report = run(options, shown=sys.stderr.isatty())
    _write(report, form, out, plot)
    if report["interrupted"]:
        raise typer.Exit(130)
    if not any(row["status"] == "ok" for row in report["results"]):
        raise typer.Exit(1)


def run(options: Options, shown: bool = False) -> dict[str, Any]:
    """Measure everything; returns {schema_version, env, config, sources, results, summary, notes, interrupted}.

    sources: properties of the vectors, by source, context and seed; see `bench.vectors.measure`. Plain data. What
    fails is a row; Ctrl-C returns what there is, with `interrupted` true.
    """
    from retrieval_attn.bench.recall.format import summary
    from retrieval_attn.bench.shared import machine

    env = machine.describe(_use_threads(options.threads))
    rows: list[Row] = []
    properties: dict[str, dict[str, float]] = {}
    interrupted = False
    with _Status(shown) as status:
        try:
            for row in _rows(options, properties, status):
                rows.append(row)
                status.finished(row)
        except KeyboardInterrupt:
            interrupted = True
    return {
        "schema_version": SCHEMA_VERSION,
        "env": env,
        "config": {**options.as_dict(), "mode": "recall"},
        "sources": properties,
        "results": rows,
        "summary": summary(rows, options.estimators),
        "notes": _notes(options, env, interrupted),
        "interrupted": interrupted,
    }


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Raise now what would be a pity after a long run."""
    if out is not None:
        if out.suffix.lower()[1:] not in FORMATS:
            raise ValueError(f"--out must end in .json, .md or .csv, got {str(out)!r}")
        check_writable(out, "--out")
    if plot is not None:
        if not plot.is_dir():
            raise ValueError(f"--plot must be a folder that exists, got {str(plot)!r}")
        require_matplotlib()


def _write(report: dict[str, Any], form: str, out: Path | None, plot: Path | None) -> None:
    from retrieval_attn.bench.recall import format as recall_format

    sys.stdout.write(recall_format.render(report, form))
    if out is not None:
        out.write_text(recall_format.render(report, out.suffix.lower()[1:]))
    if plot is not None:
        recall_format.plot(report, plot)


def _use_threads(threads: int | None) -> int:
    """Let PyTorch, numba and faiss use as many threads, all cores by default; returns how many."""
    import faiss
    import torch

    from retrieval_attn.threads.pool import set_threads

    if threads is not None:
        torch.set_num_threads(threads)
    used = torch.get_num_threads()
    set_threads(used)
    faiss.omp_set_num_threads(used)
    return used


def _rows(options: Options, properties: dict[str, dict[str, float]], status: "_Status") -> Iterator[Row]:
    """Every row; the properties of each source are added as it comes up."""
    from retrieval_attn.bench.recall.format import blank_row
    from retrieval_attn.bench.recall.measure import measure_layer
    from retrieval_attn.bench.recall.sources import Sources
    from retrieval_attn.bench.shared.failures import FAILURES, fail

    blank = functools.partial(blank_row, options.top_k)
    sources = Sources(options, status.doing)
    for context, seed, source in itertools.product(options.contexts, options.seeds, options.sources):
        known = {"source": source, "context": context, "seed": seed, "method": "vectors"}
        try:
            names = sources.layers(source, context, seed)
        except (*FAILURES, OSError) as error:
            yield fail(blank(**known), error)
            continue
        for name in names:
            status.doing(f"{name}, {context} keys, seed {seed}: vectors")
            try:
                layer, found = sources.layer(name, context, seed)
            except (*FAILURES, OSError) as error:
                yield fail(blank(**{**known, "source": name}), error)
                continue
            properties[f"{name} {short(context)} seed {seed}"] = found
            yield from measure_layer(options, layer, blank, status.doing)


class _Status:
    """What is being done, on stderr: a line that changes for a person, a line per finished row for a log."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._shown = shown
        self._line = self._console.status("starting")

    def __enter__(self) -> "_Status":
        if self._shown:
            self._line.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.stop()

    def doing(self, what: str) -> None:
        if self._shown:
            self._line.update(what)

    def finished(self, row: Row) -> None:
        if self._shown:
            return
        said = row["reason"] if row["status"] != "ok" else _numbers(row)
        where = f"{row['source']} {short(row['context'])} seed {row['seed']} {row['method']}"
        effort = "" if row["effort"] is None else f" {row['effort']}"
        print(f"{where}{effort}: {row['status']}, {said}", file=sys.stderr, flush=True)


def _numbers(row: Row) -> str:
    if row["search_us"] is None:
        return f"{row['step_topk_us']:.0f} us per step"
    return f"recall {row['recall']:.3f}, {row['visited_pct']:.2f} % visited, {row['search_us']:.0f} us"


def _notes(options: Options, env: dict[str, Any], interrupted: bool) -> list[str]:
    """The foot of the table: what was measured, on what."""
    from retrieval_attn.bench.recall.ladders import RULE

    swept = 2 * env["last_level_cache_bytes"] / 2**20
    notes = [
        machine_note(env),
        f"one step of one layer: a query per head of {options.queries} held-out ones, median; search us is the search "
        "alone, step us the search that the estimator needs and the attention over what it found",
        f"caches are cold: {swept:.0f} MiB of other memory are read and written before each step",
        "error: relative L2 distance from float32 attention over all keys, a mean over heads and queries; topk, lift "
        f"and tail attend to {options.top_k} keys per head, topk-group and tail-group to what the whole group found",
        "recall: keys whose score is that of the k-th best, within rounding, count; mass: of the softmax over all keys",
        RULE,
    ]
    if not options.check:
        notes.append("hits were not checked: do not quote these numbers")
    if interrupted:
        notes.append("interrupted: rows are missing")
    return notes
