"""A report of `bench kernels` as a Markdown table, JSON, CSV, and a picture."""

import json
from pathlib import Path
from typing import Any

from retrieval_attn.bench.kernels.rows import ROW_FIELDS
from retrieval_attn.bench.shared.machine import device_note
from retrieval_attn.bench.shared.pictures import figure_of, scale_contexts
from retrieval_attn.bench.shared.report import Columns, Report, Row, as_csv, as_json, bullets, reasons, table

# Markdown columns: heading, key of the row, how a number is written.
_COLUMNS: Columns = [
    ("length", "context", "{:,}"),
    ("kernel", "method", "{}"),
    ("status", "status", "{}"),
    ("ms", "total_ms", "{:,.3f}"),
    ("p20-p80", "spread", "{}"),
    ("x sdpa", "speedup_vs_sdpa", "{:.2f}"),
    ("x best dense", "speedup_vs_best_dense", "{:.2f}"),
    ("TFLOP/s", "tflop_per_s", "{:.3f}"),
    ("of peak", "peak_share", "{:.3f}"),
    ("GB/s", "gb_per_s", "{:.2f}"),
    ("of copy", "bandwidth_share", "{:.3f}"),
    ("density", "density", "{:.4f}"),
    ("mass", "mass", "{:.4f}"),
    ("rel. error", "rel_error", "{:.1e}"),
]


def render(report: Report, form: str) -> str:
    """The report as text that ends in a line break; form: one of FORMATS. "md" ends with a line of JSON, the rows."""
    if form == "json":
        return as_json(report)
    rows = report["results"]
    if form == "csv":
        return as_csv(rows, ROW_FIELDS)
    notes = bullets([*report["notes"], *reasons(rows)])
    return f"{_title(report)}\n\n{table(_COLUMNS, rows)}\n\n{notes}\n\n{json.dumps(rows, allow_nan=False)}\n"


def plot(report: Report, path: Path) -> None:
    """Speed beside sdpa against length, and below it the error; a line per method."""
    figure = figure_of(7.5, 7.5)
    speed, error = figure.subplots(2, 1, sharex=True)
    rows = [row for row in report["results"] if row["status"] == "ok" and row["part"] == "prefill"]
    for axes, key in ((speed, "speedup_vs_sdpa"), (error, "rel_error")):
        _draw(axes, rows, key)
        axes.grid(alpha=0.3)
    speed.set_ylabel("times as fast as sdpa, chunk by chunk")
    error.set_ylabel("relative error of the output")
    error.set_xlabel("prompt (tokens)")
    scale_contexts(error, (row["context"] for row in rows))
    if rows:
        speed.legend(frameon=False)
    speed.set_title(_title(report), fontsize=10)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, rows: list[Row], key: str) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["context"])
        points = [(row["context"], row[key]) for row in line if row[key]]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=method)
    if rows:
        axes.set_yscale("log")


def _title(report: Report) -> str:
    env, config = report["env"], report["config"]
    shape = config["shape"] if not config["source"].startswith("real") else "embedded model"
    where = device_note(env, config["device"])
    return f"Prefill of one attention layer: {shape}, {config['source']}, {config['dtype']}, {where}"
