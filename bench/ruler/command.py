"""`retrieval-attn bench ruler`: RULER's synthetic tasks, scored as published."""

from pathlib import Path
from typing import Annotated

import typer

from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, make_settings, parse_tasks
from retrieval_attn.bench.ruler.options import groups, names
from retrieval_attn.bench.shared.options import WholeModel
from retrieval_attn.terminal.options import Fields, option, with_options


@with_options
def command(
    asked: Annotated[Asked, Fields(samples=5)],
    model: WholeModel,
    config: Config,
    to: KeptReport,
    task: Annotated[
        str, option("Tasks, or retrieval (the eight of niah), or all that need no file.", "--task", "-t")
    ] = "retrieval",
    qa: Annotated[Path | None, option("SQuAD's or HotpotQA's .json, for the task qa.", "--qa")] = None,
) -> None:
    """RULER's tasks by method and length: needles, variable tracking, common and frequent words; questions from a file.

    Constructions, templates, answer prefixes and scores are the published ones; words and essays are ours.
    """
    tasks = parse_tasks(task, names(), groups())
    if ("qa" in tasks) != (qa is not None):
        raise ValueError("the task qa and --qa FILE go together: --task qa --qa squad.json")
    settings = make_settings("ruler", asked, model, config, tasks=tasks, qa=None if qa is None else str(qa))
    output = Output(to, settings.as_dict())
    from retrieval_attn.bench.quality.plot import plot_tasks
    from retrieval_attn.bench.ruler.measure import measure

    report = measure(settings, output)
    output.write(report, plot_tasks)
    raise typer.Exit(exit_status(report["results"]))
