"""`retrieval-attn bench kernels`: sparse prefill beside dense attention, and the kernels of decode."""

import sys
from typing import Annotated, Any

import typer

from retrieval_attn.bench.kernels.options import Asked, make_options
from retrieval_attn.bench.shared.options import ReportTo
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, with_options


@with_options
def command(
    asked: Asked,
    config: Annotated[RetrievalConfig, Fields("threads", "seed", rest=False)],
    to: ReportTo,
) -> None:
    """Time of one layer's prefill by each pattern, and by dense attention in the same run.

    Prompts are attended to a chunk of queries at a time, as the runtime does; of a long one, chunks at four places are
    timed, and the whole is made up from them. Beside it: the window and the merge of decode. A cell that fails is a row
    that says why.
    """
    options = make_options(asked, config)
    from retrieval_attn.bench.kernels.measure import run

    report = run(options, shown=sys.stderr.isatty())
    _write(report, to)
    if not any(row["status"] == "ok" for row in report["results"]):
        raise typer.Exit(1)


def _write(report: dict[str, Any], to: ReportTo) -> None:
    from retrieval_attn.bench.kernels import format as kernels_format

    sys.stdout.write(kernels_format.render(report, to.form))
    if to.out is not None:
        to.out.write_text(kernels_format.render(report, "json"))
    if to.plot is not None:
        kernels_format.plot(report, to.plot)
