"""`retrieval-attn bench recall`: what every index finds, for which time and bytes, on real and made-up vectors."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.recall.options import Asked, make_options
from retrieval_attn.bench.shared.options import Form, choose
from retrieval_attn.bench.shared.pictures import require_matplotlib
from retrieval_attn.bench.shared.report import FORMATS, check_writable
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
    from retrieval_attn.bench.recall.measure import run

    report = run(options, shown=sys.stderr.isatty())
    _write(report, form, out, plot)
    if report["interrupted"]:
        raise typer.Exit(130)
    if not any(row["status"] == "ok" for row in report["results"]):
        raise typer.Exit(1)


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
