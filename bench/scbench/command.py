"""`retrieval-attn bench scbench`: one context, many questions, with the cost of every turn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, Settings, make_settings, parse_tasks
from retrieval_attn.bench.quality.runner import Output, exit_status, read_haystack, run
from retrieval_attn.bench.shared.options import WholeModel, parse_names
from retrieval_attn.bench.shared.report import Report
from retrieval_attn.terminal.options import Fields, option, with_options

if TYPE_CHECKING:
    from retrieval_attn.bench.quality.examples import Example, Prompts
    from retrieval_attn.llm import LLM

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
    report = measure(settings, output)
    from retrieval_attn.bench.quality.plot import plot_tasks

    output.write(report, plot_tasks)
    raise typer.Exit(exit_status(report["results"]))


def names() -> list[str]:
    """Every task that is generated."""
    from retrieval_attn.bench.scbench.tasks import TASKS

    return list(TASKS)


def groups() -> dict[str, Any]:
    """Names for several tasks."""
    from retrieval_attn.bench.scbench.tasks import STRING_RETRIEVAL, TASKS

    return {"string": list(STRING_RETRIEVAL), "all": list(TASKS)}


def measure(settings: Settings, output: Output) -> Report:
    """The report of these tasks."""
    read = _read_data(settings)
    text = read_haystack(settings.text)

    def maker_of(task: str, n_tokens: int, sample: int) -> Any:
        from retrieval_attn.bench.scbench.tasks import scbench_maker

        return scbench_maker(task, n_tokens, sample, settings.seed, text)

    def plan(llm: Any) -> Any:
        from retrieval_attn.bench.quality.examples import Prompts
        from retrieval_attn.bench.quality.plan import plan_examples, plan_tasks

        modes = settings.options["modes"]
        if read is None:
            return plan_tasks(settings, settings.options["tasks"], maker_of, modes, llm)
        longest, prompts = min(max(settings.contexts), llm.max_tokens), Prompts(llm)
        return plan_examples(read[: settings.limit], longest, modes, lambda one: cut(one, longest, llm, prompts))

    report = run(settings, output, plan)
    report["notes"] += [
        "multi-turn: the first question is read exactly with the context, as in SCBench, all but its last token, so it "
        "has no TTFT; the history holds the right answers",
        "multi-request: the context was read without a question, but for mf, where one stands before the numbers",
        "with followup=retrieve questions go through the method, too; vt here has five chains of two hops",
    ]
    return report


def _read_data(settings: Settings) -> Any:
    if settings.options["data"] is None:
        return None
    from retrieval_attn.bench.scbench.files import read_scbench

    task = settings.options["tasks"][0]
    return read_scbench(Path(settings.options["data"]), None if task == "string" else task)


def cut(example: "Example", longest: int, llm: "LLM", prompts: "Prompts") -> "Example":
    """The example, its context cut in the middle so that all turns and an answer fit into `longest` tokens.

    Raises ValueError if its turns alone leave no room.
    """
    from dataclasses import replace

    from retrieval_attn.bench.scbench.files import truncate_middle

    bare = replace(example, context="")
    around = prompts.count(bare) + prompts.room(bare)
    # Where the halves meet, and at both ends, tokens may part.
    room = longest - around - SEAMS
    if room < 2:
        raise ValueError(f"the turns of {example.id} take {around} tokens of {longest}; ask for a longer --context")
    return replace(example, context=truncate_middle(example.context, room, llm.encode_text, llm.decode))


# Tokens more than before that a cut context may have, encoded again.
SEAMS = 16
