"""Reports of the quality benchmarks as Markdown, JSON or CSV: scores first, then what they cost."""

from collections.abc import Sequence
from typing import Any

from retrieval_attn.bench.quality.rows import ROW_FIELDS, SCORE_FIELDS
from retrieval_attn.bench.quality.scores import costs, score
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.report import Columns, Report, Row, as_csv, as_json, bullets, short, table

_COSTS: Columns = [
    ("method", "method", "{}"),
    ("context", "context", "{}"),
    ("mode", "mode", "{}"),
    ("turn", "turn", "{}"),
    ("score %", "score", "{:.1f}"),
    ("TTFT ms", "ttft_ms", "{:.0f}"),
    ("read s", "read_s", "{:.2f}"),
    ("build s", "build_s", "{:.2f}"),
    ("ms/token", "tpot_ms", "{:.2f}"),
    ("visited %", "visited_pct", "{:.1f}"),
    ("KV MiB", "kv_bytes", "MiB"),
    ("of it on the device", "device_kv_bytes", "MiB"),
    ("index MiB", "index_bytes", "MiB"),
    ("peak RSS MiB", "rss_bytes", "MiB"),
    ("peak device MiB", "peak_device_bytes", "MiB"),
]


def render(report: Report, form: str, scores_only: bool = False) -> str:
    """The report as text that ends in a line break; form: "md", "json" or "csv".

    scores_only: without anything that differs from run to run.
    """
    fields = SCORE_FIELDS if scores_only else ROW_FIELDS
    if form == "csv":
        rows = _repeatable(report["results"], scores_only)
        return as_csv([{**row, "refs": "|".join(row["refs"] or [])} for row in rows], fields)
    if form == "json":
        kept = {key: value for key, value in report.items() if not (scores_only and key == "env")}
        kept["results"] = [{key: row[key] for key in fields} for row in _repeatable(report["results"], scores_only)]
        return as_json(kept, indent=1)
    return _as_markdown(report, scores_only)


def _repeatable(rows: Sequence[Row], scores_only: bool) -> list[Row]:
    """Rows without reasons that tell how much memory was free, if only what does not change is wanted."""
    return [{**row, "reason": ""} if scores_only and row["status"] == "oom" else row for row in rows]


def _as_markdown(report: Report, scores_only: bool) -> str:
    parts = [f"{report['bench']}: score in %, mean over answers", score_table(report)]
    if not scores_only and any(row["status"] == "ok" for row in report["results"]):
        # What a shared context saves shows from the second turn on.
        keys = ("method", "context", "mode", "turn") if report["bench"] == "scbench" else ("method", "context")
        parts.append(table(_COSTS, cost_lines(report["results"], keys)))
    notes = [*report["notes"], *_reasons(_repeatable(report["results"], scores_only))]
    if not scores_only:
        notes.insert(0, machine_note(report["env"]))
    if notes:
        parts.append(bullets(notes))
    return "\n\n".join(parts) + "\n"


# What tells answers apart, in the order in which a table names it.
_KEYS = ("task", "context", "mode", "turn")


def score_table(report: Report) -> str:
    """A line per task, length, mode and turn (in a needle test: depth); a column per method. Only what varies has a
    column of its own."""
    rows = report["results"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    candidates = ("task", "context", "depth") if report["bench"] == "needle" else _KEYS
    keys = [key for key in candidates if len({row[key] for row in rows if row[key] is not None}) > 1] or ["task"]
    lines = []
    for group in _groups(rows, keys):
        # A method that failed has one row for all turns.
        own = [row for row in rows if all(row[key] in (None, value) for key, value in zip(keys, group, strict=True))]
        lines.append({**dict(zip(keys, map(_word, keys, group), strict=True)), **_scores(own, methods)})
    if len(lines) > 1:
        lines.append({**dict.fromkeys(keys, ""), keys[0]: "all", **_scores(rows, methods)})
    columns = [(key, key, "{}") for key in keys] + [(method, f"={method}", "{}") for method in methods]
    return table([*columns, ("answers", "n", "{}")], lines)


def _groups(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[Any, ...]]:
    found = [tuple(row[key] for key in keys) for row in rows]
    return list(dict.fromkeys(group for group in found if None not in group)) or found[:1]


def _word(key: str, value: Any) -> str:
    if value is None:
        return ""
    return short(value) if key == "context" else f"{value:.2f}" if key == "depth" else str(value)


def _scores(rows: Sequence[Row], methods: Sequence[str]) -> Row:
    found = {method: score([row for row in rows if row["method"] == method]) for method in methods}
    counts = sorted({one.answered for one in found.values() if one.asked})
    many = "" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return {**{f"={method}": str(one) for method, one in found.items()}, "n": many}


def cost_lines(rows: Sequence[Row], keys: Sequence[str] = ("method", "context")) -> list[Row]:
    """A line per method and length (or as `keys` say), as a table shows it, see `costs`."""
    return [
        {"mode": None, "turn": None, **line, "context": short(line["context"]), **_seconds(line)}
        for line in costs(rows, keys)
    ]


def _seconds(line: Row) -> Row:
    of = {name: line[f"{name}_ms"] for name in ("read", "build")}
    return {f"{name}_s": None if taken is None else taken / 1e3 for name, taken in of.items()}


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why methods failed, each once."""
    return list(dict.fromkeys(f"{row['method']}: {row['reason']}" for row in rows if row["reason"]))
