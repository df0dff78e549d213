"""`retrieval-attn bench compare`: methods side by side on one task, each from prompt to answer by itself."""

from typing import Annotated, Any

import typer

from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, Settings, make_settings, parse_tasks
from retrieval_attn.bench.quality.runner import Output, exit_status, read_haystack, run
from retrieval_attn.bench.ruler import command as ruler
from retrieval_attn.bench.scbench import command as scbench
from retrieval_attn.bench.shared.options import WholeModel
from retrieval_attn.bench.shared.report import Report
from retrieval_attn.terminal.options import Fields, option, with_options

DEFAULT = (
    "full,folded,streaming,exact,ivf,hnsw,graph,scan,page,scan:estimator=topk,scan:estimator=lift,offloaded,"
    "quantized,full:weights=int8,full:weights=int4"
)


@with_options
def command(
    asked: Annotated[Asked, Fields(context="32k", method=DEFAULT, samples=3)],
    model: WholeModel,
    config: Config,
    to: KeptReport,
    task: Annotated[str, option("One task: needle, of RULER, or of SCBench.", "--task", "-t")] = "niah_single_2",
) -> None:
    """Methods on one task in one process: score, time to first token, build, ms per token, memory, keys visited.

    Each method reads every prompt by itself. One that fails is a row with its reason. --plot draws score against speed.

    Methods: full and folded (stock attention, the second with the head group folded into the query axis), streaming
    (sinks and window only), offloaded and quantized (transformers' caches), exact, ivf, hnsw, graph, scan, page, auto;
    each with options, such as graph:top_k=200:estimator=lift, quantized:bits=2:backend=hqq or full:weights=int4.
    """
    found = parse_tasks(task, names(), {})
    if len(found) != 1:
        raise ValueError(f"--task must name one task to compare on, got {task!r}")
    settings = make_settings("compare", asked, model, config, task=found[0])
    output = Output(to, settings.as_dict())
    report = measure(settings, output)
    from retrieval_attn.bench.quality.plot import plot_pareto

    output.write(report, plot_pareto)
    raise typer.Exit(exit_status(report["results"]))


def names() -> list[str]:
    """Tasks of all three benchmarks that need no file; of equal names RULER's comes first."""
    return list(dict.fromkeys(["needle", *(name for name in ruler.names() if name != "qa"), *scbench.names()]))


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
        from retrieval_attn.bench.quality.run import MULTI_REQUEST

        return plan_tasks(settings, [task], maker_of, [MULTI_REQUEST], llm)

    report = run(settings, output, plan, share=False)
    report["notes"] += [
        f"task {task}; each method read each prompt by itself, in this process, in turn; TTFT is from question to "
        "first token; read and build come before it",
        "peak RSS is that of the process: weights and libraries are in it, and what other methods left",
    ]
    return report
