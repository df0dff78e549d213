"""`retrieval-attn bench ppl`: how well each method foretells a long text, and how far from full attention it is."""

from typing import Annotated

import typer

from retrieval_attn.bench.ppl.format import plot_lines, render
from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import ONE_TEXT, Asked, ExactConfig, KeptReport, make_settings
from retrieval_attn.bench.shared.options import WholeModel, at_least
from retrieval_attn.terminal.options import Fields, option, with_options


@with_options
def command(
    asked: Annotated[Asked, Fields(*ONE_TEXT, context="8k,16k,32k")],
    model: WholeModel,
    config: ExactConfig,
    to: KeptReport,
    stretch: Annotated[int, option("Tokens that are foretold after each context.", "--stretch")] = 256,
) -> None:
    """Perplexity of a long text after each context, and agreement with and KL divergence from full attention.

    The text is read once, exactly; after each context every method is given the tokens that follow, one at a time.
    """
    settings = make_settings("ppl", asked, model, config, stretch=at_least(stretch, 1, "--stretch"))
    output = Output(to, settings.as_dict())
    from retrieval_attn.bench.ppl.measure import measure

    report = measure(settings, output)
    output.write(report, plot_lines, render)
    raise typer.Exit(exit_status(report["results"]))
