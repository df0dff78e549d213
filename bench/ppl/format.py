"""Reports of `bench ppl` as Markdown, JSON, CSV or a picture; and what other reports about one text share."""

from pathlib import Path

from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.report import Report, as_csv, as_json, bullets, reasons, short, table

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
    """The report as text, see `quality.format.render`."""
    from retrieval_attn.bench.ppl.reading import COST_FIELDS, SCORE_FIELDS

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
