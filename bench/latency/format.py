"""A report of `bench latency` as a Markdown table, JSON, CSV, or a picture."""

from pathlib import Path
from typing import Any

from retrieval_attn.bench.shared.machine import device_note
from retrieval_attn.bench.shared.pictures import lines_of, log_axis, save
from retrieval_attn.bench.shared.report import Columns, Report, Row, as_csv, as_json, bullets, reasons, table

# Markdown columns: heading, key of the row, how a number is written.
_LAYER_COLUMNS: Columns = [
    ("context", "context", "{:,}"),
    ("method", "method", "{}"),
    ("status", "status", "{}"),
    ("ms", "total_ms", "{:.3f}"),
    ("p20-p80", "spread", "{}"),
    ("near", "near_ms", "{:.3f}"),
    ("search", "search_ms", "{:.3f}"),
    ("gather", "gather_ms", "{:.3f}"),
    ("merge", "merge_ms", "{:.3f}"),
    ("rest", "rest_ms", "{:.3f}"),
    ("x full", "speedup_vs_full", "{:.2f}"),
    ("x folded", "speedup_vs_folded", "{:.2f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("recall", "recall", "{:.3f}"),
    ("rel. error", "rel_error", "{:.1e}"),
    ("GB/s", "gb_per_s", "{:.1f}"),
    ("build s", "build_s", "{:.1f}"),
    ("index MiB", "index_bytes", "MiB"),
    ("KV MiB", "kv_bytes", "MiB"),
    ("peak RSS MiB", "peak_rss_bytes", "MiB"),
]
_MODEL_COLUMNS: Columns = [
    *_LAYER_COLUMNS[:3],
    ("TTFT ms", "ttft_ms", "{:.0f}"),
    ("prefill ms", "prefill_ms", "{:.0f}"),
    ("build s", "build_s", "{:.1f}"),
    ("TPOT ms", "total_ms", "{:.2f}"),
    ("p20-p80", "spread", "{}"),
    ("p50", "itl_p50_ms", "{:.2f}"),
    ("p90", "itl_p90_ms", "{:.2f}"),
    ("p99", "itl_p99_ms", "{:.2f}"),
    *_LAYER_COLUMNS[5:13],
    ("logit error", "rel_error", "{:.1e}"),
    *_LAYER_COLUMNS[17:],
]

# CSV: one column per plain value of a row, in this order; raw samples are in the JSON only.
ROW_FIELDS = (
    "context", "method", "status", "reason", "check", "layers", "steps",
    "total_ms", "total_p20_ms", "total_p80_ms", "near_ms", "search_ms", "gather_ms", "merge_ms", "rest_ms",
    "all_layers_ms",
    "speedup_vs_full", "speedup_vs_folded", "visited_pct", "recall", "rel_error",
    "bytes_per_step", "gb_per_s", "bandwidth_share", "caches",
    "ttft_ms", "prefill_ms", "tpot_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms",
    "build_s", "index_bytes", "kv_bytes", "peak_rss_bytes", "peak_device_bytes",
)  # fmt: skip


def blank_row(context: int, method: str) -> Row:
    """A row with every field, unmeasured."""
    return {**dict.fromkeys(ROW_FIELDS), "context": context, "method": method, "status": "failed", "samples": {}}


def render(report: Report, form: str) -> str:
    """The report as text that ends in a line break; form: one of FORMATS."""
    if form == "json":
        return as_json(report)
    if form == "csv":
        return as_csv(report["results"], ROW_FIELDS)
    return _as_markdown(report)


def plot(report: Report, path: Path) -> None:
    """Write a picture of latency against context to a .png or .svg file."""
    rows = [row for row in report["results"] if row["status"] == "ok"]
    save(lambda: chart(rows, report["config"]["mode"]), _title(report), path)


def chart(rows: list[Row], mode: str) -> Any:
    """A figure of latency against context, a line per method, its p20 to p80 shaded; both axes logarithmic."""
    per = "token" if mode == "model" else "step and layer"
    figure = lines_of(rows, "total_ms", f"milliseconds per {per}", band=("total_p20_ms", "total_p80_ms"))
    if rows:
        log_axis(figure.axes[0], "y")
    return figure


def _title(report: Report) -> str:
    env, config = report["env"], report["config"]
    return f"Decode attention: {config['shape']}, {config['dtype']}, {device_note(env, config['device'])}"


def _as_markdown(report: Report) -> str:
    columns = _MODEL_COLUMNS if report["config"]["mode"] == "model" else _LAYER_COLUMNS
    notes = bullets([*report["notes"], *reasons(report["results"])])
    return f"{_title(report)}\n\n{table(columns, report['results'])}\n\n{notes}\n"
