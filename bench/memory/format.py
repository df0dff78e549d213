"""Two tables of `bench memory`: peaks beside their plans, and the times of a session."""

from typing import Any

from retrieval_attn.bench.shared.report import Row, table

PHASES = ("load", "prefill", "build", "decode", "save", "restore")


_PEAKS = [
    ("context", "context", "{}"),
    ("index", "index", "{}"),
    ("phase", "phase", "{}"),
    ("planned MiB", "planned_host", "MiB"),
    ("measured MiB", "measured_host", "MiB"),
    ("ratio", "host_ratio", "{:.3f}"),
    ("device planned MiB", "planned_device", "MiB"),
    ("device measured MiB", "measured_device", "MiB"),
    ("device ratio", "device_ratio", "{:.3f}"),
]


_TIMES = [
    ("context", "context", "{}"),
    ("index", "index", "{}"),
    ("tokens", "tokens", "{:,}"),
    ("TTFT s", "ttft_s", "{:.2f}"),
    ("prefill s", "prefill_s", "{:.2f}"),
    ("build s", "build_s", "{:.2f}"),
    ("second question s", "second_question_s", "{:.3f}"),
    ("% of TTFT", "second_pct", "{:.2f}"),
    ("save s", "save_s", "{:.2f}"),
    ("restore s", "restore_s", "{:.2f}"),
    ("first token after restore s", "first_token_after_restore_s", "{:.2f}"),
    ("right", "right", "{}"),
]


def as_text(rows: list[Row]) -> str:
    """Two Markdown tables, peaks and times, and a line for every context that failed."""
    good = [row for row in rows if row["status"] == "ok"]
    failed = [f"- {row['context']} {row['index']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    parts = []
    if good:
        parts = [table(_PEAKS, [line for row in good for line in peak_lines(row)]), table(_TIMES, _time_lines(good))]
        if not all(row["exact_peaks"] for row in good):
            parts.append("- this system cannot begin a peak anew: a phase shows the highest of all phases before it")
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def peak_lines(row: Row) -> list[Row]:
    """A line for every phase, planned, measured, and their ratio; then one for the highest of all."""
    lines = [_peak_line(row, name, row["planned"][name], row["measured"][name]) for name in PHASES]
    highest = [
        {where: max(row[side][name][where] for name in PHASES) for where in ("host", "device")}
        for side in ("planned", "measured")
    ]
    return [*lines, _peak_line(row, "peak", *highest)]


def _peak_line(row: Row, phase: str, planned: dict[str, Any], measured: dict[str, Any]) -> Row:
    line = {"context": row["context"], "index": row["index"], "phase": phase}
    for where in ("host", "device"):
        known = planned[where] > 0
        line[f"planned_{where}"] = planned[where] if known else None
        line[f"measured_{where}"] = measured[where] if known else None
        line[f"{where}_ratio"] = measured[where] / planned[where] if known else None
    return line


def _time_lines(rows: list[Row]) -> list[Row]:
    return [
        {
            **row,
            "second_pct": 100 * row["second_question_s"] / row["ttft_s"],
            "right": f"{row['answers_right']} of {row['answers']}",
        }
        for row in rows
    ]
