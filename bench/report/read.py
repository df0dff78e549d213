"""Files of results, read and checked: what passes can be shown without further questions."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.bench.memory.format import PHASES
from retrieval_attn.bench.report.columns import ROWS
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row

# In the order of the page.
KINDS = tuple(ROWS)
ANSWERS = ("compare", "needle", "ruler", "scbench")


@dataclass(frozen=True)
class ReportFile:
    """One file of results. rows: each has every key that a table or a plot of its kind reads, None where unmeasured."""

    path: Path
    kind: str
    env: Row
    config: Row
    rows: list[Row]
    notes: list[str]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def commit(self) -> str:
        """Twelve characters of it, and whether files were changed since."""
        git = self.env.get("git") or {}
        return str(git.get("commit") or "unknown")[:12] + (", changed files" if git.get("dirty") else "")

    @property
    def good(self) -> list[Row]:
        """The rows that were measured."""
        return [row for row in self.rows if row.get("status") in ("ok", None)]


class Skipped(NamedTuple):
    """A file that is not shown, and why."""

    name: str
    reason: str


class Found(NamedTuple):
    """What a folder holds; reports by kind, then by name."""

    folder: Path
    reports: list[ReportFile]
    skipped: list[Skipped]

    def of(self, *kinds: str) -> list[ReportFile]:
        return [report for report in self.reports if report.kind in kinds]


class _Needs(NamedTuple):
    """What a row must have: texts, numbers, and numbers that a row with status "ok" must have."""

    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    measured: tuple[str, ...] = ()


_ANSWER = _Needs(("task", "method", "status"), ("context",), ("score",))
_NEEDS = {
    "latency": _Needs(("method", "status"), ("context",), ("total_ms",)),
    "recall": _Needs(("source", "method", "status"), ("context", "seed"), ("recall",)),
    "kernels": _Needs(("part", "method", "status"), ("context",), ("total_ms",)),
    "memory": _Needs(("context", "index", "status"), ()),
    "long": _Needs((), ("new_tokens", "tokens_per_s")),
    "ppl": _Needs(("method", "status"), ("context",), ("ppl",)),
    "fidelity": _Needs(("method", "status"), ("context", "layer", "head"), ("error",)),
    **dict.fromkeys(ANSWERS, _ANSWER),
}


def read_folder(folder: Path) -> Found:
    """Every .json file of the folder, as a report or as skipped. Raises ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"--results must be a folder that exists, got {str(folder)!r}")
    reports, skipped = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            reports.append(read_report(path))
        except ValueError as error:
            skipped.append(Skipped(path.name, str(error)))
    reports.sort(key=lambda report: (KINDS.index(report.kind), report.name))
    return Found(folder, reports, skipped)


def read_report(path: Path) -> ReportFile:
    """One file; ValueError, in one line, for one that is no report or that lacks what its kind shows."""
    found = _parsed(path)
    kind = _kind(path, found)
    for name, form in (("env", dict), ("config", dict), ("results", list)):
        if not isinstance(found.get(name), form):
            raise ValueError(f"no report: {name!r} must be {'a list' if form is list else 'an object'}")
    for name in ("git", "packages"):
        if not isinstance(found["env"].get(name) or {}, dict):
            raise ValueError(f"env.{name} must be an object")
    for number, row in enumerate(found["results"], 1):
        for fault in _faults(kind, row):
            raise ValueError(f"row {number}: {fault}")
    blank = dict.fromkeys(key for _, key, _ in ROWS[kind])
    rows = [{**blank, **row} for row in found["results"]]
    notes = [str(note) for note in found.get("notes") or []]
    return ReportFile(path, kind, found["env"], found["config"], rows, notes)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("no report: the file must hold an object")
    return found


def _kind(path: Path, found: dict[str, Any]) -> str:
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}")
    # Reports from before every benchmark wrote its name into them begin with it in their file's name.
    kind = found.get("bench", path.name.split("-")[0])
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"bench must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def _faults(kind: str, row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield "must be an object"
        return
    needs = _NEEDS[kind]
    for name in needs.texts:
        if not isinstance(row.get(name), str):
            yield f"{name!r} must be text, got {row.get(name)!r}"
    measured = needs.measured if row.get("status") == "ok" else ()
    for name in (*needs.numbers, *measured):
        if not _is_number(row.get(name)):
            yield f"{name!r} must be a number, got {row.get(name)!r}"
    for _, name, form in ROWS[kind]:
        if form != "{}" and row.get(name) is not None and not _is_number(row[name]):
            yield f"{name!r} must be a number or null, got {row[name]!r}"
    if not isinstance(row.get("mode") or "", str):
        yield f"'mode' must be text, got {row['mode']!r}"
    if kind == "memory" and row["status"] == "ok" and not _has_peaks(row):
        yield f"'planned' and 'measured' must give host and device bytes of {', '.join(PHASES)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _has_peaks(row: Row) -> bool:
    try:
        return all(
            _is_number(row[side][phase][where])
            for side in ("planned", "measured")
            for phase in PHASES
            for where in ("host", "device")
        )
    except (KeyError, TypeError):
        return False
