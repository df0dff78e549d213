"""`retrieval-attn bench needle`: is a number found, whatever the length of the text and wherever it stands?"""

from typing import Annotated

import typer

from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, make_settings
from retrieval_attn.bench.shared.options import WholeModel, at_least
from retrieval_attn.terminal.options import Fields, option, with_options


@with_options
def command(
    asked: Annotated[Asked, Fields(context="8k,16k,32k")],
    model: WholeModel,
    config: Config,
    to: KeptReport,
    depths: Annotated[int, option("Places of the needle, from the start to the end.", "--depths")] = 10,
    plain: Annotated[
        bool, option("Ask without MInference's instructions, for models that know none.", "--plain")
    ] = False,
    together: Annotated[
        bool, option("Hide the needles of all depths in one text, which is then read once.", "--together")
    ] = False,
) -> None:
    """A magic number hidden in a long text: exact match by length and depth, with a heat-map picture (--plot).

    The text is read once, exactly, and then goes on by each method, which answers as often as there are samples.
    """
    own = {"depths": at_least(depths, 1, "--depths"), "plain": plain, "together": together}
    settings = make_settings("needle", asked, model, config, **own)
    output = Output(to, settings.as_dict())
    from retrieval_attn.bench.needle.measure import measure
    from retrieval_attn.bench.quality.plot import plot_grid

    report = measure(settings, output)
    output.write(report, plot_grid)
    raise typer.Exit(exit_status(report["results"]))
