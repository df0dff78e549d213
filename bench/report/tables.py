"""The tables of a report, by kind of benchmark, as data and as HTML."""

from collections.abc import Callable, Iterable
from html import escape
from statistics import mean
from typing import Any, NamedTuple

from retrieval_attn.bench.memory.command import peak_lines
from retrieval_attn.bench.quality.scores import costs, grouped, methods, score_lines
from retrieval_attn.bench.recall.curves import at_recall
from retrieval_attn.bench.recall.format import RECALL
from retrieval_attn.bench.report import columns
from retrieval_attn.bench.report.columns import Columns
from retrieval_attn.bench.report.read import ANSWERS, Report
from retrieval_attn.bench.shared.report import Row

# Of an answer, more says nothing that the score does not.
LONGEST_TEXT = 200

# Longer texts are broken into lines, in a cell of some width.
_ONE_LINE = 48


class Table(NamedTuple):
    """One table of a report. folded: shown when asked for."""

    heading: str
    columns: Columns
    rows: list[Row]
    folded: bool = False


def tables(report: Report) -> list[Table]:
    """What a report says in numbers, the summary first."""
    return _TABLES[report.kind](report)


def as_html(table: Table) -> str:
    """A table in a box that scrolls by itself; columns that are empty in every row are left out."""
    used = [column for column in table.columns if any(_cell(row, column) for row in table.rows)]
    heads = "".join(f'<th scope="col"{_side(form)}>{escape(heading)}</th>' for heading, _, form in used)
    lines = [
        f"<tr{_class(row)}>" + "".join(_td(_cell(row, column), column[2]) for column in used) + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(lines)
    label = escape(table.heading or "results", quote=True)
    html = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{escape(table.heading)}</summary>\n{html}\n</details>"
    return (f"<h4>{escape(table.heading)}</h4>\n" if table.heading else "") + html


def _td(text: str, form: str) -> str:
    kind = ' class="text long"' if form == "{}" and len(text) > _ONE_LINE else _side(form)
    return f"<td{kind}>{escape(text)}</td>"


def _side(form: str) -> str:
    return ' class="text"' if form == "{}" else ""


def _class(row: Row) -> str:
    return "" if row.get("status") in ("ok", None) else ' class="lost"'


def _cell(row: Row, column: tuple[str, str, str]) -> str:
    _, key, form = column
    value = row.get(key)
    if value is None:
        return ""
    if form == "MiB":
        return f"{value / 2**20:,.1f}"
    if form != "{}":
        return form.format(value)
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _as_measured(report: Report) -> list[Table]:
    return [Table("", columns.ROWS[report.kind], report.rows)]


def _recall(report: Report) -> list[Table]:
    found = [_told(row, report.rows) for row in at_recall(report.rows, RECALL)]
    folded = Table(f"Every effort ({len(report.rows)} rows)", columns.RECALL, report.rows, folded=True)
    return [Table(f"Search at recall {RECALL}, interpolated along each curve", columns.AT_RECALL, found), folded]


def _told(row: Row, rows: Iterable[Row]) -> Row:
    """A row of `at_recall`, with milliseconds, and a word where the figures are not what the heading says."""
    if row["search_us"] is None:
        return {**row, "remark": "never gets there"}
    remark = "at most: the least effort is better already" if row["bound"] else None
    return {**row, "search_ms": row["search_us"] / 1e3, "remark": remark}


def _memory(report: Report) -> list[Table]:
    peaks = [line for row in report.good for line in peak_lines(row)]
    times = Table("Times of a session", columns.MEMORY, report.rows)
    return [Table("Peak of every phase, planned and measured", columns.PEAKS, peaks), times] if peaks else [times]


def _answers(report: Report) -> list[Table]:
    lines = score_lines(report.rows, by_turn=True)
    names = methods(lines)
    rows = [
        {**line._asdict(), "answers": line.answers}
        | {f"score of {name}": str(one) for name, one in line.scores.items()}
        for line in lines
    ]
    asked: Columns = [*columns.ASKED, *((name, f"score of {name}", "{:>}") for name in names)]
    return [
        Table("Mean score, per cent", asked, rows),
        Table("Cost: medians of times and shares, largest of bytes", columns.COSTS, costs(report.rows)),
        Table(f"Every answer ({len(report.rows)} rows)", columns.ANSWERS, report.rows, folded=True),
    ]


def _fidelity(report: Report) -> list[Table]:
    rows = []
    for (context, method), group in grouped(report.good, lambda row: (row["context"], row["method"])).items():
        errors = [row["error"] for row in group]
        line: Row = {"context": context, "method": method, "heads": len(group), "worst_error": max(errors)}
        for name in ("error", "mass", "recall", "planted"):
            values = [row[name] for row in group if row[name] is not None]
            line[f"mean_{name}"] = mean(values) if values else None
        rows.append(line)
    folded = Table(f"Every head ({len(report.rows)} rows)", columns.FIDELITY, report.rows, folded=True)
    lost = [row for row in report.rows if row["status"] != "ok"]
    failures = [Table("What failed", columns.FIDELITY, lost)] if lost else []
    return [Table("Over all heads", columns.HEADS, rows), *failures, folded]


_TABLES: dict[str, Callable[[Report], list[Table]]] = {
    **dict.fromkeys(columns.ROWS, _as_measured),
    **dict.fromkeys(ANSWERS, _answers),
    "recall": _recall,
    "memory": _memory,
    "fidelity": _fidelity,
}


def settings(config: Row) -> list[tuple[str, str]]:
    """What a benchmark was asked for, as words; what was left open is left out."""
    return [(name, _words(value)) for name, value in config.items() if value not in (None, [], {}, "")]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_words(part)}" for name, part in value.items())
    return str(value)
