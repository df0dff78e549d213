"""A report of `bench kernels` as a Markdown table, JSON, CSV, and a picture."""

import json
from pathlib import Path
from typing import Any

from retrieval_attn.bench.kernels.rows import ROW_FIELDS
from retrieval_attn.bench.shared.machine import device_note
from retrieval_attn.bench.shared.pictures import add_key, draw_lines, figure_of, log_axis, save, styles
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
    """Write a picture of speed beside sdpa against length to a .png or .svg file."""
    rows = [row for row in report["results"] if row["status"] == "ok"]
    save(lambda: chart(rows), _title(report), path)


def chart(rows: list[Row]) -> Any:
    """A figure of prefill's speed beside sdpa against length, and below it the error; a line per method."""
    rows = [row for row in rows if row["part"] == "prefill"]
    figure = figure_of(7.6, 6.4)
    speed, error = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    looks = styles(row["method"] for row in rows)
    draw_lines(speed, rows, "speedup_vs_sdpa", looks)
    draw_lines(error, rows, "rel_error", looks)
    speed.set(ylabel="times as fast as sdpa, chunk by chunk", ylim=(0, None))
    error.set(ylabel="relative error of the output", xlabel="prompt (tokens)")
    if rows:
        log_axis(error, "y")
    add_key(figure, looks)
    return figure


def _title(report: Report) -> str:
    env, config = report["env"], report["config"]
    shape = config["shape"] if not config["source"].startswith("real") else "embedded model"
    where = device_note(env, config["device"])
    return f"Prefill of one attention layer: {shape}, {config['source']}, {config['dtype']}, {where}"
