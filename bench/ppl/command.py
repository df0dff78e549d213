"""`retrieval-attn bench ppl`: how well each method foretells a long text, and how far from full attention it is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_attn.bench.quality.options import ONE_TEXT, Asked, ExactConfig, KeptReport, Settings, make_settings
from retrieval_attn.bench.quality.runner import (
    Output,
    as_report,
    bar,
    exit_status,
    load_llm,
    parse_methods,
    read_haystack,
    say,
)
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.options import WholeModel, at_least
from retrieval_attn.bench.shared.report import Report, as_csv, as_json, bullets, reasons, short, table
from retrieval_attn.terminal.options import Fields, option, with_options

if TYPE_CHECKING:
    from retrieval_attn.bench.methods.bench import Bench
    from retrieval_attn.bench.methods.named import Method
    from retrieval_attn.bench.ppl.measure import Task


@with_options
def command(
    asked: Annotated[Asked, Fields(*ONE_TEXT, context="8k,16k,32k")],
    model: WholeModel,
    config: ExactConfig,
    to: KeptReport,
    stretch: Annotated[int, option("Tokens that are foretold after each context.", "--stretch")] = 256,
) -> None:
    """Perplexity of a long text after each context, and agreement with and KL divergence from full attention.

    The text is read once, exactly; after each context every method is given the tokens that follow, one at a time.
    """
    settings = make_settings("ppl", asked, model, config, stretch=at_least(stretch, 1, "--stretch"))
    output = Output(to, settings.as_dict())
    report = measure(settings, output)
    output.write(report, plot_lines, render)
    raise typer.Exit(exit_status(report["results"]))


def measure(settings: Settings, output: Output) -> Report:
    """The report of one text. Raises ValueError for a context that is longer than the text or the model."""
    text = read_haystack(settings.text)
    stretch = settings.options["stretch"]

    def begin(bench: "Bench", methods: Sequence["Method"]) -> tuple[list[int], "Task"]:
        from retrieval_attn.bench.methods.named import parse_method
        from retrieval_attn.bench.ppl.measure import Foretelling, require_room, text_ids

        # What is fed last foretells one more.
        longest, more = max(settings.contexts), stretch + 1
        ids = text_ids(bench.llm, text, longest + more, settings.seed)
        require_room(longest, more, len(ids), bench.llm)
        return ids, Foretelling(bench, ids, stretch, parse_method("full", methods[0].config))

    report = run(settings, output, begin)
    report["notes"] += NOTES
    return report


NOTES = [
    "agreement: tokens whose likeliest one is full attention's; KL: from full attention, nats per token",
    "far contexts shorter than exact_below (2048) are scanned exactly, whatever the index",
]

Begin = Callable[["Bench", "Sequence[Method]"], "tuple[list[int], Task]"]


def run(settings: Settings, output: Output, begin: Begin, load: Callable[[Settings], Any] = load_llm) -> Report:
    """Load the model, run a task over one text, report; returns what `quality.run` does.

    begin: the text's token ids, and the task. Raises ValueError for an unknown method before the model is loaded.
    """
    from retrieval_attn.bench.methods.bench import Bench
    from retrieval_attn.bench.ppl.measure import left_to_do, read_and_measure
    from retrieval_attn.bench.quality.run import collect
    from retrieval_attn.bench.shared import machine

    methods = parse_methods(settings)
    device, threads = machine.prepare(settings.device, settings.config.threads)
    # Now, and not at the end: the commit is that of the code that runs.
    settings, env = replace(settings, device=device), machine.describe(threads)
    with bar(settings.bench) as advance:
        advance("loading the model", 0)
        bench = Bench(load(settings), partial(load_llm, settings))
        ids, task = begin(bench, methods)
        left = left_to_do(settings.contexts, methods, settings.limit, output.kept.rows if output.kept else ())
        rows = collect(read_and_measure(bench, ids, left, task, advance), output.kept, say)
    places = {label: i for i, label in enumerate(settings.methods)}
    rows.sort(key=lambda row: (settings.contexts.index(row["context"]), places[row["method"]]))
    return as_report(settings, env, rows)


_COLUMNS = [
    ("context", "context", "{}"),
    ("method", "method", "{}"),
    ("tokens", "tokens", "{}"),
    ("perplexity", "ppl", "{:.3f}"),
    ("agreement", "agreement", "{:.1%}"),
    ("KL nats", "kl", "{:.2e}"),
    ("ms/token", "tpot_ms", "{:.2f}"),
    ("visited %", "visited_pct", "{:.1f}"),
    ("status", "status", "{}"),
]


def render(report: Report, form: str, scores_only: bool = False) -> str:
    """The report as text, see `quality_format.render`."""
    from retrieval_attn.bench.ppl.measure import COST_FIELDS, SCORE_FIELDS

    fields = SCORE_FIELDS if scores_only else SCORE_FIELDS + COST_FIELDS
    columns = [column for column in _COLUMNS if not (scores_only and column[1] in COST_FIELDS)]
    lines = [{**row, "context": short(row["context"])} for row in report["results"]]
    return as_text(report, form, scores_only, fields, [f"{title(report)}: perplexity", table(columns, lines)])


def title(report: Report) -> str:
    """What was read by whom."""
    config = report["config"]
    model = "the embedded model" if config["model"] is None else Path(config["model"]).name
    if config.get("random"):
        model += " with random weights"
    # Of a model without a tokenizer not even prose is read.
    texts = [] if config["text"] is None else [Path(config["text"]).name]
    return ", ".join([report["bench"], model, *texts])


def as_text(report: Report, form: str, scores_only: bool, fields: tuple[str, ...], parts: list[str]) -> str:
    """The report as CSV or JSON with these fields, or as Markdown: parts, notes, and why methods failed."""
    if form == "csv":
        return as_csv(report["results"], fields)
    if form == "json":
        kept = {key: value for key, value in report.items() if not (scores_only and key == "env")}
        kept["results"] = [{key: row[key] for key in fields} for row in report["results"]]
        return as_json(kept, indent=1)
    notes = [*report["notes"], *reasons(report["results"])]
    if not scores_only:
        notes.insert(0, machine_note(report["env"]))
    return "\n\n".join([*parts, bullets(notes)]) + "\n"


def plot_lines(report: Report, path: Path) -> None:
    """Write a picture of perplexity against context to a .png or .svg file."""
    from retrieval_attn.bench.shared.pictures import lines_of, save

    rows = [row for row in report["results"] if row["status"] == "ok"]
    save(lambda: lines_of(rows, "ppl", "perplexity of the tokens that follow"), title(report), path)
