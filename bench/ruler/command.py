"""`retrieval-attn bench ruler`: RULER's synthetic tasks, scored as published."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, Settings, make_settings, parse_tasks
from retrieval_attn.bench.quality.runner import Output, exit_status, read_haystack, run
from retrieval_attn.bench.shared.options import WholeModel
from retrieval_attn.bench.shared.report import Report
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
    report = measure(settings, output)
    from retrieval_attn.bench.quality.plot import plot_tasks

    output.write(report, plot_tasks)
    raise typer.Exit(exit_status(report["results"]))


def names() -> list[str]:
    """Every task."""
    from retrieval_attn.bench.ruler.tasks import TASKS

    return [*TASKS, "qa"]


def groups() -> dict[str, Any]:
    """Names for several tasks."""
    from retrieval_attn.bench.ruler.tasks import RETRIEVAL, TASKS

    return {"retrieval": list(RETRIEVAL), "all": list(TASKS)}


def measure(settings: Settings, output: Output) -> Report:
    """The report of these tasks."""
    text, maker = read_haystack(settings.text), _qa_maker(settings)

    def maker_of(task: str, n_tokens: int, sample: int) -> Any:
        from retrieval_attn.bench.ruler.tasks import ruler_maker

        return maker(n_tokens, sample) if task == "qa" else ruler_maker(task, n_tokens, sample, settings.seed, text)

    def plan(llm: Any) -> Any:
        from retrieval_attn.bench.quality.plan import plan_tasks
        from retrieval_attn.bench.quality.run import MULTI_REQUEST

        return plan_tasks(settings, settings.options["tasks"], maker_of, [MULTI_REQUEST], llm)

    report = run(settings, output, plan)
    report["notes"] += [
        "score: the share of the references that an answer contains (RULER's string_match_all; for qa, any of them)",
        "the context was read exactly, once for all methods; with followup=retrieve the question goes through the "
        "method, too",
    ]
    return report


def _qa_maker(settings: Settings) -> Callable[[int, int], Any]:
    if settings.options["qa"] is None:
        return lambda n_tokens, sample: None
    from retrieval_attn.bench.ruler.questions import qa_maker, read_qa

    data = read_qa(settings.options["qa"])
    return lambda n_tokens, sample: qa_maker(data, n_tokens, sample, settings.seed)
