"""`retrieval-attn bench scbench`: one context, many questions, with the cost of every turn."""

from pathlib import Path
from typing import Annotated

import typer

from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, make_settings, parse_tasks
from retrieval_attn.bench.scbench.options import groups, names
from retrieval_attn.bench.shared.options import WholeModel, parse_names
from retrieval_attn.terminal.options import Fields, option, with_options

MODES = ("multi-turn", "multi-request")


@with_options
def command(
    asked: Annotated[Asked, Fields(samples=3)],
    model: WholeModel,
    config: Config,
    to: KeptReport,
    task: Annotated[
        str, option("Tasks, or string (its string retrieval), or all that need no file.", "--task", "-t")
    ] = "string",
    mode: Annotated[str, option(f"{' or '.join(MODES)}, or both.", "--mode")] = ",".join(MODES),
    data: Annotated[Path | None, option("Published JSON lines, instead of generated examples.", "--data")] = None,
) -> None:
    """SCBench's shared contexts: several questions about one text, with scores, latency and memory of every turn.

    multi-turn: questions follow each other, and the history holds the right answers. multi-request: each question comes
    right after the context, which was read without knowing it. With --data, contexts are cut in the middle to the
    longest of --context.
    """
    modes = list(parse_names(mode, MODES, "--mode"))
    if not modes:
        raise ValueError(f"--mode must be of {', '.join(MODES)}, got {mode!r}")
    tasks = [task] if data is not None else parse_tasks(task, names(), groups())
    own = {"modes": modes, "tasks": tasks, "data": None if data is None else str(data)}
    settings = make_settings("scbench", asked, model, config, **own)
    output = Output(to, settings.as_dict())
    from retrieval_attn.bench.quality.plot import plot_tasks
    from retrieval_attn.bench.scbench.measure import measure

    report = measure(settings, output)
    output.write(report, plot_tasks)
    raise typer.Exit(exit_status(report["results"]))
