"""What all reports have in common: rows, and how they are written as JSON, CSV and Markdown tables."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

FORMATS = ("md", "json", "csv")

Row = dict[str, Any]
Report = dict[str, Any]

# Of a table: heading, key of the row, how a number is written.
Columns = list[tuple[str, str, str]]


def results_folder() -> Path:
    """Where reports lie by default: bench/results in the source tree, the current folder for an installed package."""
    kept = Path(__file__).resolve().parents[1] / "results"
    return kept if kept.is_dir() else Path()


def check_writable(path: Path, flag: str) -> None:
    """Raise ValueError now if a file cannot be written later."""
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{flag} must name a file, got the folder {str(path)!r}")
    if not folder.is_dir():
        raise ValueError(f"{flag} must lie in a folder that exists, got {str(path)!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{flag} must be writable, got {str(path)!r}")


def short(n: int) -> str:
    """131072 as 128k, 1048576 as 1m, other numbers as they are."""
    for unit, size in (("m", 1 << 20), ("k", 1 << 10)):
        if n and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def as_json(report: Report, indent: int = 2) -> str:
    """The report as JSON that ends in a line break. Raises ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(report, indent=indent, allow_nan=False) + "\n"


def as_csv(rows: list[Row], fields: tuple[str, ...]) -> str:
    """A header and a line per row, with these of its fields."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def table(columns: Columns, rows: list[Row]) -> str:
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


def timed_line(row: Row) -> str:
    """What became of one row, for a log."""
    said = f"{row['total_ms']:.3f} ms" if row["status"] == "ok" else row["reason"]
    return f"{short(row['context'])} {row['method']}: {row['status']}, {said}"


def reasons(rows: list[Row]) -> list[str]:
    """Why rows failed, each reason once, with context and method before it."""
    return list(
        dict.fromkeys(f"{short(row['context'])} {row['method']}: {row['reason']}" for row in rows if row["reason"])
    )


def bullets(notes: list[str]) -> str:
    """A Markdown list without a line break at its end."""
    return "\n".join(f"- {note}" for note in notes)


def _cell(row: Row, key: str, form: str) -> str:
    if key == "spread":
        low, high = row["total_p20_ms"], row["total_p80_ms"]
        return "" if low is None else f"{low:.3f}-{high:.3f}"
    value = row[key]
    if value is None:
        return ""
    return f"{value / 2**20:,.1f}" if form == "MiB" else form.format(value)
