"""Runs of `bench ruler`."""

from collections.abc import Callable
from typing import Any

from retrieval_attn.bench.quality.measure import Output, read_haystack, run
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.shared.report import Report


def measure(settings: Settings, output: Output) -> Report:
    """The report of these tasks."""
    text, maker = read_haystack(settings.text), _qa_maker(settings)

    def maker_of(task: str, n_tokens: int, sample: int) -> Any:
        from retrieval_attn.bench.ruler.tasks import ruler_maker

        return maker(n_tokens, sample) if task == "qa" else ruler_maker(task, n_tokens, sample, settings.seed, text)

    def plan(llm: Any) -> Any:
        from retrieval_attn.bench.quality.plan import plan_tasks
        from retrieval_attn.bench.quality.runner import MULTI_REQUEST

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
