"""What the commands of the quality benchmarks have in common: load, run with a bar, keep, report."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrieval_attn.bench.quality.options import KeptReport, Settings
from retrieval_attn.bench.shared.bars import bar, say
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Report, Row

# A report as text: the report, its form, and whether scores are all that is wanted.
Render = Callable[[Report, str, bool], str]


class Output:
    """Where a report goes. Made, and so checked, before anything is measured."""

    def __init__(self, to: KeptReport, config: dict[str, Any]) -> None:
        """config: plain data, by which a run that is resumed knows its own. ValueError if it does not."""
        from retrieval_attn.bench.quality.runner import Kept

        self.form, self.out, self.plot_to, self.scores_only = to.form, to.out, to.plot, to.scores_only
        self.kept = None if to.out is None else Kept(to.out, config, to.resume)

    def write(self, report: Report, plot: Callable[[Report, Path], None], render: Render | None = None) -> None:
        """Print the report, write it, draw it. What was kept is let go only then.

        render: as `quality.format.render`, which is for answers, and taken by default.
        """
        from retrieval_attn.atomic_file import write_whole
        from retrieval_attn.bench.quality import format as quality_format

        render = render or quality_format.render
        if self.out is not None:
            write_whole(self.out, render(report, "json", False), durable=True)
        sys.stdout.write(render(report, self.form, self.scores_only))
        if self.plot_to is not None:
            plot(report, self.plot_to)
        if self.kept is not None:
            self.kept.close()


def run(settings: Settings, output: Output, plan: Callable[[Any], Sequence[Any]], share: bool = True) -> Report:
    """Load the model, plan, run; returns {schema_version, bench, env, config, results, notes}, plain data.

    plan: what to run, given the loaded LLM. Raises ValueError for an unknown method before the model is loaded.
    """
    from retrieval_attn.bench.methods.bench import Bench
    from retrieval_attn.bench.quality.runner import Runner, collect
    from retrieval_attn.bench.shared import machine

    methods = parse_methods(settings)
    device, threads = machine.prepare(settings.device, settings.config.threads)
    # Now, and not at the end: the commit is that of the code that runs.
    settings, env = replace(settings, device=device), machine.describe(threads)
    with bar(settings.bench) as advance:
        advance("loading the model", 0)
        bench = Bench(load_llm(settings), lambda weights: load_llm(settings, weights))
        planned = plan(bench.llm)
        runner = Runner(bench, methods, device, share, lambda step: advance(*step))
        kept = output.kept
        rows = collect(runner.rows(planned, kept.rows if kept else ()), kept, say)
    order = {one.example: i for i, one in enumerate(planned)}
    places = {label: i for i, label in enumerate(settings.methods)}
    rows.sort(key=lambda row: (order[row["example"]], row["mode"], places[row["method"]], row["turn"] or 0))
    return as_report(settings, env, rows)


def parse_methods(settings: Settings) -> list[Any]:
    """The methods of a run; ValueError for an unknown one."""
    from retrieval_attn.bench.methods.named import parse_method

    return [parse_method(label, settings.config) for label in settings.methods]


def as_report(settings: Settings, env: dict[str, Any], rows: list[Row]) -> Report:
    """Plain data, see `run`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": settings.bench,
        "env": env,
        "config": settings.as_dict(),
        "results": rows,
        "notes": [],
    }


def load_llm(settings: Settings, weights: str = "auto") -> Any:
    """The model of a run, with transformers' own noise off."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    from retrieval_attn.config import RetrievalConfig
    from retrieval_attn.llm import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    config = RetrievalConfig(seed=settings.seed, threads=settings.config.threads)
    return load(settings.model, config, device=settings.device, dtype=settings.dtype, weights=weights)


def read_haystack(path: str | None) -> str | None:
    """The text of --text. Raises ValueError or OSError in one line, see `terminal.files.read_text`."""
    if path is None:
        return None
    from retrieval_attn.terminal.files import read_text

    text = read_text(path)
    if not text.split():
        raise ValueError(f"{path} holds no words; --text needs a text to hide things in")
    return text


def exit_status(rows: Sequence[Row]) -> int:
    """0 if anything was answered, else 1."""
    return 0 if any(row["status"] == "ok" for row in rows) else 1
