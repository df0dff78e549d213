"""A benchmark's report as a Markdown table, JSON, CSV, or a picture."""

import csv
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

FORMATS = ("md", "json", "csv")
PICTURES = (".png", ".svg")

Row = dict[str, Any]

# Markdown columns: heading, key of the row, how a number is written.
_LAYER_COLUMNS = [
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
_MODEL_COLUMNS = [
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


def render(report: dict[str, Any], form: str) -> str:
    """The report as text that ends in a line break; form: one of FORMATS."""
    if form == "json":
        return json.dumps(report, indent=2, allow_nan=False) + "\n"
    if form == "csv":
        return as_csv(report["results"], ROW_FIELDS)
    return _as_markdown(report)


def check_writable(path: Path, flag: str) -> None:
    """Raise ValueError now if a file cannot be written later."""
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{flag} must name a file, got the folder {str(path)!r}")
    if not folder.is_dir():
        raise ValueError(f"{flag} must lie in a folder that exists, got {str(path)!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{flag} must be writable, got {str(path)!r}")


def check_plot(path: Path) -> None:
    """Raise now what would keep `plot` from working after a long run."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot must end in {' or '.join(PICTURES)}, got {str(path)!r}")
    check_writable(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'retrieval-attn[plot]'")


def plot(report: dict[str, Any], path: Path) -> None:
    """Latency against context, a line per method, its p20 to p80 shaded; both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [row for row in report["results"] if row["status"] == "ok"]
    contexts = sorted({row["context"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["context"])
        at = [row["context"] for row in line]
        (drawn,) = axes.plot(at, [row["total_ms"] for row in line], marker="o", label=method)
        axes.fill_between(
            at, [row["total_p20_ms"] for row in line], [row["total_p80_ms"] for row in line],
            color=drawn.get_color(), alpha=0.15, linewidth=0,
        )  # fmt: skip
    # A logarithmic axis without data would warn about its limits.
    if rows:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [short(n) for n in contexts])
        axes.minorticks_off() if len(contexts) > 1 else None
        axes.legend(frameon=False)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("milliseconds per " + ("token" if report["config"]["mode"] == "model" else "step and layer"))
    axes.set_title(_title(report), fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def short(n: int) -> str:
    """131072 as 128k, 1048576 as 1m, other numbers as they are."""
    for unit, size in (("m", 1 << 20), ("k", 1 << 10)):
        if n and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def _title(report: dict[str, Any]) -> str:
    env, config = report["env"], report["config"]
    device = env["gpu"] if config["device"].startswith("cuda") else f"{env['cpu']}, {env['threads']} threads"
    return f"Decode attention: {config['shape']}, {config['dtype']}, {device}"


def as_csv(rows: list[Row], fields: tuple[str, ...]) -> str:
    """A header and a line per row, with these of its fields."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def table(columns: list[tuple[str, str, str]], rows: list[Row]) -> str:
    """A Markdown table without a line break at its end; columns: heading, key of the row, how a number is written.

    Columns that are empty in every row are left out.
    """
    cells = [[_cell(row, key, form) for _, key, form in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = [
        "| " + " | ".join(columns[i][0] for i in used) + " |",
        "|" + "|".join(" --- " if columns[i][2] == "{}" else " ---: " for i in used) + "|",
        *("| " + " | ".join(row[i] for i in used) + " |" for row in cells),
    ]
    return "\n".join(lines)


def _as_markdown(report: dict[str, Any]) -> str:
    columns = _MODEL_COLUMNS if report["config"]["mode"] == "model" else _LAYER_COLUMNS
    reasons = [
        f"{short(row['context'])} {row['method']}: {row['reason']}" for row in report["results"] if row["reason"]
    ]
    notes = "\n".join(f"- {note}" for note in [*report["notes"], *reasons])
    return f"{_title(report)}\n\n{table(columns, report['results'])}\n\n{notes}\n"


def _cell(row: Row, key: str, form: str) -> str:
    if key == "spread":
        low, high = row["total_p20_ms"], row["total_p80_ms"]
        return "" if low is None else f"{low:.3f}-{high:.3f}"
    value = row[key]
    if value is None:
        return ""
    return f"{value / 2**20:,.1f}" if form == "MiB" else form.format(value)
