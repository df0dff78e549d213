"""Runs of `bench compare`."""

from typing import Any

from retrieval_attn.bench.quality.measure import Output, read_haystack, run
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.shared.report import Report


def measure(settings: Settings, output: Output) -> Report:
    """The report of one task."""
    text, task = read_haystack(settings.text), settings.options["task"]

    def maker_of(task: str, n_tokens: int, sample: int) -> Any:
        from retrieval_attn.bench.needle import tasks as needle_tasks
        from retrieval_attn.bench.ruler import tasks as ruler_tasks
        from retrieval_attn.bench.scbench import tasks as scbench_tasks

        if task == "needle":
            # Depths as even as the samples allow, the ends left out: sinks and window hold them.
            depth = (sample + 0.5) / settings.samples
            return needle_tasks.needle_maker(n_tokens, [depth], sample, settings.seed, text)
        maker = ruler_tasks.ruler_maker if task in ruler_tasks.TASKS else scbench_tasks.scbench_maker
        return maker(task, n_tokens, sample, settings.seed, text)

    def plan(llm: Any) -> Any:
        from retrieval_attn.bench.quality.plan import plan_tasks
        from retrieval_attn.bench.quality.runner import MULTI_REQUEST

        return plan_tasks(settings, [task], maker_of, [MULTI_REQUEST], llm)

    report = run(settings, output, plan, share=False)
    report["notes"] += [
        f"task {task}; each method read each prompt by itself, in this process, in turn; TTFT is from question to "
        "first token; read and build come before it",
        "peak RSS is that of the process: weights and libraries are in it, and what other methods left",
    ]
    return report
