"""The tables of a report, by kind of benchmark; the summary first."""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from retrieval_attn.bench.memory.format import peak_lines
from retrieval_attn.bench.quality.scores import costs, grouped, methods, score_lines
from retrieval_attn.bench.recall.curves import at_recall
from retrieval_attn.bench.recall.format import RECALL
from retrieval_attn.bench.report.columns import ASKED, AT_RECALL, COSTS, HEADS, PEAKS, ROWS
from retrieval_attn.bench.report.read import ANSWERS, ReportFile
from retrieval_attn.bench.shared.report import Columns, Row

# A longer summary is folded away: the picture says it in a glance.
_LONGEST_SUMMARY = 30

# Of an answer, more says nothing that the score does not.
LONGEST_TEXT = 200


class Table(NamedTuple):
    """One table of a report. folded: shown when asked for."""

    heading: str
    columns: Columns
    rows: list[Row]
    folded: bool = False

    @property
    def used(self) -> Columns:
        """The columns that are not empty in every row."""
        return [column for column in self.columns if any(cell(row, column) for row in self.rows)]


def cell(row: Row, column: tuple[str, str, str]) -> str:
    """What a table shows of a row; nothing for None."""
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


def tables(report: ReportFile) -> list[Table]:
    """What a report says in numbers, the summary first; nothing of a report without rows."""
    return _TABLES.get(report.kind, _as_measured)(report) if report.rows else []


def _as_measured(report: ReportFile) -> list[Table]:
    return [Table("", ROWS[report.kind], report.rows)]


def _every(report: ReportFile, what: str) -> Table:
    return Table(f"Every {what} ({len(report.rows)} rows)", ROWS[report.kind], report.rows, folded=True)


def _recall(report: ReportFile) -> list[Table]:
    found = [_told(row) for row in at_recall(report.rows, RECALL)]
    return [
        Table(f"Search at recall {RECALL}, between the efforts measured", AT_RECALL, found),
        _every(report, "effort"),
    ]


def _told(row: Row) -> Row:
    """A row of `at_recall`, with milliseconds, and a word where the figures are not what the heading says."""
    if row["search_us"] is None:
        return {**row, "remark": "never gets there"}
    remark = "at most: the least effort is better already" if row["bound"] else None
    return {**row, "search_ms": row["search_us"] / 1e3, "remark": remark}


def _memory(report: ReportFile) -> list[Table]:
    peaks = [line for row in report.good for line in peak_lines(row)]
    times = Table("Times of a session", ROWS["memory"], report.rows)
    return [Table("Peak of every phase, planned and measured", PEAKS, peaks), times] if peaks else [times]


def _answers(report: ReportFile) -> list[Table]:
    lines = score_lines(report.rows, by_turn=True)
    # A method may be called like a column.
    own = [(name, f"score of {name}", "{:>}") for name in methods(lines)]
    rows = [
        {
            **line._asdict(),
            "answers": line.answers,
            **{f"score of {name}": str(one) for name, one in line.scores.items()},
        }
        for line in lines
    ]
    return [
        Table("Mean score, per cent", [*ASKED, *own], rows, folded=len(rows) > _LONGEST_SUMMARY),
        Table("Cost: medians of times and shares, largest of bytes", COSTS, costs(report.rows)),
        _every(report, "answer"),
    ]


def _fidelity(report: ReportFile) -> list[Table]:
    rows = []
    for (context, method), group in grouped(report.good, lambda row: (row["context"], row["method"])).items():
        line: Row = {"context": context, "method": method, "heads": len(group)}
        for name in ("error", "mass", "recall", "planted"):
            values = [row[name] for row in group if row[name] is not None]
            line[f"mean_{name}"] = mean(values) if values else None
        rows.append({**line, "worst_error": max(row["error"] for row in group)})
    lost = [row for row in report.rows if row["status"] != "ok"]
    failures = [Table("What failed", ROWS["fidelity"], lost)] if lost else []
    return [Table("Over all heads", HEADS, rows), *failures, _every(report, "head")]


_TABLES: dict[str, Callable[[ReportFile], list[Table]]] = {
    **dict.fromkeys(ANSWERS, _answers),
    "recall": _recall,
    "memory": _memory,
    "fidelity": _fidelity,
}
