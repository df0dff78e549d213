"""`retrieval-attn bench compare`: methods side by side on one task, each from prompt to answer by itself."""

from typing import Annotated

import typer

from retrieval_attn.bench.compare.options import names
from retrieval_attn.bench.quality.measure import Output, exit_status
from retrieval_attn.bench.quality.options import Asked, Config, KeptReport, make_settings, parse_tasks
from retrieval_attn.bench.shared.options import WholeModel
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
    from retrieval_attn.bench.compare.measure import measure
    from retrieval_attn.bench.quality.plot import plot_pareto

    report = measure(settings, output)
    output.write(report, plot_pareto)
    raise typer.Exit(exit_status(report["results"]))
