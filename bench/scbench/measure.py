"""Runs of `bench scbench`: examples that are made, or those of a published file, cut to fit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_attn.bench.quality.measure import Output, read_haystack, run
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.shared.report import Report

if TYPE_CHECKING:
    from retrieval_attn.bench.quality.examples import Example, Prompts
    from retrieval_attn.llm import LLM


# Tokens more than before that a cut context may have, encoded again.
SEAMS = 16


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
