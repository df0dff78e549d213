"""`retrieval-attn bench fidelity`: attention outputs, head by head, beside exact attention; for any model and text."""

from typing import Annotated

import typer

from retrieval_attn.bench.fidelity.format import plot_heads, render
from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import ONE_TEXT, Asked, ExactConfig, KeptReport, make_settings
from retrieval_attn.bench.shared.options import WholeModel, at_least
from retrieval_attn.terminal.options import Fields, option, with_options

# The runtime keeps so many queries of the newest tokens.
MOST_QUERIES = 256


@with_options
def command(
    asked: Annotated[Asked, Fields(*ONE_TEXT, method="exact,graph,scan,page,streaming")],
    model: WholeModel,
    config: ExactConfig,
    to: KeptReport,
    queries: Annotated[int, option("Tokens after each context whose queries ask, up to 256.", "--queries")] = 64,
    planted: Annotated[int, option("Keys planted for each query head; 0: none.", "--planted")] = 32,
    random: Annotated[bool, option("Random weights, for a folder that has only a config.json.", "--random")] = False,
) -> None:
    """How near each head's attention comes to exact attention: no answers are needed, nor a trained model.

    Held-out queries over a text that was read once, exactly: error of the output, mass of what was read, recall of the
    best keys, and how many planted keys are found. Methods are ours, and streaming, which is the window alone.
    """
    own = {"queries": at_least(queries, 1, "--queries"), "planted": at_least(planted, 0, "--planted"), "random": random}
    settings = make_settings("fidelity", asked, model, config, **own)
    if queries > MOST_QUERIES:
        raise ValueError(f"--queries must be at most {MOST_QUERIES}, got {queries}")
    output = Output(to, settings.as_dict())
    from retrieval_attn.bench.fidelity.measure import measure

    report = measure(settings, output)
    output.write(report, plot_heads, render)
    raise typer.Exit(exit_status(report["results"]))
