"""`retrieval-attn bench latency`: decode latency against context length, beside stock attention in the same run."""

import sys

import typer

from retrieval_attn.bench.latency import format as latency_format
from retrieval_attn.bench.latency.options import Asked, Config, make_options
from retrieval_attn.bench.shared.options import ReportTo
from retrieval_attn.terminal.options import with_options


@with_options
def command(asked: Asked, config: Config, to: ReportTo) -> None:
    """Decode latency of retrieval and of stock attention, per context length.

    With --shape llama3-8b or H,G,D attention layers alone are timed on synthetic vectors; with --shape embedded or
    --model the whole model, from prompt to last token. A cell that fails is a row that says why.
    """
    options = make_options(asked, config)
    from retrieval_attn.bench.latency.measure import run

    report = run(options, progress=sys.stderr.isatty())
    sys.stdout.write(latency_format.render(report, to.form))
    if to.out is not None:
        to.out.write_text(latency_format.render(report, "json"))
    if to.plot is not None:
        latency_format.plot(report, to.plot)
    if not any(row["status"] == "ok" for row in report["results"]):
        raise typer.Exit(1)
