"""Reports of the quality benchmarks as Markdown, JSON or CSV: scores first, then what they cost."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median
from typing import Any

from retrieval_attn.bench.quality.rows import ROW_FIELDS, SCORE_FIELDS
from retrieval_attn.bench.quality.scores import score
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
    """A line per method and length (or as `keys` say): medians over answers, the largest peaks."""
    good, lines = [row for row in rows if row["status"] == "ok"], []
    for group in _groups(good, keys) if good else ():
        own = [row for row in good if tuple(row[key] for key in keys) == group]
        named = dict(zip(keys, group, strict=True))
        lines.append({"mode": None, "turn": None, **named, "context": short(named["context"]), **_cost_of(own)})
    return lines


def _cost_of(rows: Sequence[Row]) -> Row:
    line = {key: _over(median, rows, key) for key in ("ttft_ms", "tpot_ms", "visited_pct", "read_ms", "build_ms")}
    line |= {key: _over(max, rows, key) for key in
             ("kv_bytes", "device_kv_bytes", "index_bytes", "rss_bytes", "peak_device_bytes")}  # fmt: skip
    line["score"] = 100 * mean(row["score"] for row in rows)
    return {**line, **{f"{name}_s": _seconds(line[f"{name}_ms"]) for name in ("read", "build")}}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _over(combine: Callable[[Iterable[float]], float], rows: Sequence[Row], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return combine(known) if known else None


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why methods failed, each once."""
    return list(dict.fromkeys(f"{row['method']}: {row['reason']}" for row in rows if row["reason"]))
