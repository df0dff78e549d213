"""A report of `bench recall` as a Markdown table, JSON, CSV, and a picture per source."""

from functools import partial
from pathlib import Path
from typing import Any

from retrieval_attn.bench.recall.curves import at_error, at_recall, curves, growth
from retrieval_attn.bench.recall.estimators import ESTIMATORS
from retrieval_attn.bench.shared.machine import device_note
from retrieval_attn.bench.shared.pictures import figure_of, log_axis, save, styles
from retrieval_attn.bench.shared.report import Columns, Report, Row, as_csv, as_json, bullets, short, table
from retrieval_attn.bench.vectors.sources import properties_table

RECALL, ERROR = 0.95, 0.02

_STYLES: dict[str, Any] = dict(zip(ESTIMATORS, ("-", "--", ":", (0, (5, 1, 1, 1)), (0, (1, 1))), strict=True))

_WHICH: Columns = [
    ("source", "source", "{}"),
    ("keys", "context", "{:,}"),
    ("seed", "seed", "{}"),
    ("method", "method", "{}"),
    ("effort", "effort", "{:,}"),
]
_SEARCH: Columns = [
    *_WHICH,
    ("status", "status", "{}"),
    ("recall", "recall", "{:.3f}"),
    ("worst head", "worst_head_recall", "{:.3f}"),
    ("mass", "mass", "{:.3f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("MiB read", "bytes_read", "MiB"),
    ("search us", "search_us", "{:,.0f}"),
    ("p20", "search_p20_us", "{:,.0f}"),
    ("p80", "search_p80_us", "{:,.0f}"),
    ("build s", "build_s", "{:.1f}"),
    ("index MiB", "index_bytes", "MiB"),
    ("% of KV", "index_pct", "{:.1f}"),
]
_ATTENTION: Columns = [
    *_WHICH,
    *((f"error {name}", f"err_{name}", "{:.4f}") for name in ESTIMATORS),
    *((f"step us {name}", f"step_{name}_us", "{:,.0f}") for name in ESTIMATORS),
]

# CSV: one column per plain value of a row, in this order; raw samples are in the JSON only.
ROW_FIELDS = (
    "source", "context", "seed", "method", "effort", "status", "reason", "check", "top_k", "queries",
    "recall", "worst_head_recall", "mass", "best_mass", *(f"err_{name}" for name in ESTIMATORS),
    "visited_pct", "bytes_read", "search_us", "search_p20_us", "search_p80_us",
    *(f"step_{name}_us" for name in ESTIMATORS),
    "build_s", "lift_build_s", "index_bytes", "index_pct", "tail_build_s", "tail_bytes",
)  # fmt: skip

_AT_RECALL: Columns = [
    *_WHICH[:4],
    ("search us", "search_us", "{:,.0f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("MiB read", "bytes_read", "MiB"),
    ("at most", "bound", "{}"),
]
_AT_ERROR: Columns = [
    *_WHICH[:4],
    ("step us", "step_us", "{:,.0f}"),
    ("estimator", "estimator", "{}"),
    ("at most", "bound", "{}"),
]
_GROWTH: Columns = [
    ("source", "source", "{}"),
    ("seed", "seed", "{}"),
    ("method", "method", "{}"),
    ("from", "from", "{:,}"),
    ("to", "to", "{:,}"),
    ("x", "ratio", "{:.2f}"),
]


def blank_row(top_k: int, **known: Any) -> Row:
    """A row with every field, unmeasured but for those known."""
    return {**dict.fromkeys(ROW_FIELDS), "top_k": top_k, "status": "failed", "samples": {}, **known}


def summary(rows: list[Row], estimators: tuple[str, ...]) -> dict[str, Any]:
    """Time at equal recall and at equal output error, and its growth with the context; plain data."""
    equal_recall = at_recall(rows, RECALL)
    equal_error = at_error(rows, ERROR, estimators) if estimators else []
    return {"at_recall": equal_recall, "at_error": equal_error, "growth": growth(equal_recall)}


def render(report: Report, form: str) -> str:
    """The report as text that ends in a line break; form: "md", "json" or "csv"."""
    if form == "json":
        return as_json(report)
    if form == "csv":
        return as_csv(report["results"], ROW_FIELDS)
    return _as_markdown(report)


def plot(report: Report, folder: Path) -> list[Path]:
    """A picture per source, context and seed: output error against time, recall against visited keys."""
    rows = [row for row in report["results"] if row["status"] == "ok"]
    pictures = []
    for source, context, seed in dict.fromkeys((row["source"], row["context"], row["seed"]) for row in rows):
        part = [row for row in rows if (row["source"], row["context"], row["seed"]) == (source, context, seed)]
        path = folder / f"recall-{source.replace(':', '')}-{short(context)}-seed{seed}.png"
        title = f"{source}, {context:,} keys, seed {seed}: {device_note(report['env'], 'cpu')}"
        save(partial(_drawn, part), title, path)
        pictures.append(path)
    return pictures


def _drawn(rows: list[Row]) -> Any:
    """A figure; colours are methods, line styles are estimators; efforts along a line in their order."""
    from matplotlib.lines import Line2D

    figure = figure_of(12.5, 4.8)
    errors, recalls = figure.subplots(1, 2)
    lines = {method: line for (*_, method), line in curves(rows).items()}
    colours = {method: look["color"] for method, look in styles(lines).items()}
    for method, line in lines.items():
        for name, style in _STYLES.items():
            points = [(row[f"step_{name}_us"], row[f"err_{name}"]) for row in line if row[f"err_{name}"]]
            if points:
                errors.plot(*zip(*points, strict=True), marker=".", color=colours[method], ls=style, lw=1)
        points = [(row["visited_pct"], row["recall"]) for row in line]
        recalls.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours[method])
    if errors.has_data():
        log_axis(errors, "x")
        log_axis(errors, "y")
    errors.set(xlabel="microseconds per layer and step, search and attention", ylabel="relative L2 error of the output")
    log_axis(recalls, "x")
    recalls.set(xlabel="keys visited (%)", ylabel=f"recall@{rows[0]['top_k']}")
    drawn = [name for name in _STYLES if any(row[f"err_{name}"] for row in rows)]
    key = [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
    key += [Line2D([], [], color="black", ls=_STYLES[name], label=name) for name in drawn]
    figure.legend(handles=key, loc="outside right center", fontsize=8)
    return figure


def _as_markdown(report: Report) -> str:
    rows, found = report["results"], report["summary"]
    parts = [f"Retrieval per layer and step: {device_note(report['env'], 'cpu')}", table(_SEARCH, rows)]
    attended = [row for row in rows if any(row[f"err_{name}"] is not None for name in ESTIMATORS)]
    at_recall = [row for row in found["at_recall"] if row["search_us"] is not None]
    at_error = [row for row in found["at_error"] if row["step_us"] is not None]
    for heading, columns, lines in (
        ("Output error and time of a step, by estimator:", _ATTENTION, attended),
        (f"At recall {RECALL} (methods not named never get there):", _AT_RECALL, _marked(at_recall)),
        (f"At output error {ERROR}, search and attention:", _AT_ERROR, _marked(at_error)),
        (f"Growth of the search at recall {RECALL}:", _GROWTH, found["growth"]),
    ):
        if lines:
            parts += [heading, table(columns, lines)]
    if report["sources"]:
        parts.append(properties_table(report["sources"]).rstrip())
    reasons = [
        f"{row['source']} {short(row['context'])} seed {row['seed']} {row['method']}: {row['reason']}"
        for row in rows
        if row["reason"]
    ]
    parts.append(bullets([*report["notes"], *reasons]))
    return "\n\n".join(parts) + "\n"


def _marked(rows: list[Row]) -> list[Row]:
    """Only bounds are worth a word."""
    return [{**row, "bound": "yes" if row["bound"] else None} for row in rows]
