"""Answers, counted: mean scores by what was asked and by method, and what the answers cost."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from retrieval_attn.bench.quality.rows import COST_FIELDS
from retrieval_attn.bench.shared.report import Row

_WORDS = {"oom": "out of memory"}


class Score(NamedTuple):
    """Answers of one method to the same kind of question. mean: over those there are, from 0 to 1; None without any.
    missing: the status of most of the others."""

    mean: float | None
    answered: int
    asked: int
    missing: str = ""

    def __str__(self) -> str:
        """In per cent; an answer that is missing is never silent."""
        if self.mean is None:
            return self.missing
        lost = self.asked - self.answered
        return f"{100 * self.mean:.1f}" + (f" ({lost} of {self.asked} {self.missing})" if lost else "")


class Line(NamedTuple):
    """What was asked, and how well each method answered. turn: None if all turns are together."""

    task: str
    context: int
    mode: str
    turn: int | None
    scores: dict[str, Score]

    @property
    def answers(self) -> str:
        """How many answers stand behind each mean; a range if methods differ."""
        counts = [score.answered for score in self.scores.values()]
        return f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"


def score(rows: Iterable[Row]) -> Score:
    """Mean score of the rows that are answers."""
    rows = list(rows)
    scores = [row["score"] for row in rows if row["status"] == "ok"]
    missing = Counter(row["status"] for row in rows if row["status"] != "ok").most_common(1)
    word = missing[0][0] if missing else ""
    return Score(mean(scores) if scores else None, len(scores), len(rows), _WORDS.get(word, word))


def score_lines(rows: Iterable[Row], by_turn: bool) -> list[Line]:
    """By task and context, and by mode and turn if they are asked for, in order of appearance; turns ascend.

    A row without a turn is a method that lost an example: it counts as missing in each of its turns.
    """

    def asked(row: Row) -> tuple[Any, ...]:
        return (row["task"], row["context"], *((row["mode"] or "", row["turn"]) if by_turn else ("", None)))

    lines = []
    for (task, context, mode, turn), group in grouped(_every_turn(rows), asked).items():
        parts = grouped(group, lambda row: row["method"])
        lines.append(Line(task, context, mode, turn, {name: score(part) for name, part in parts.items()}))
    tasks = list(dict.fromkeys(line.task for line in lines))
    return sorted(lines, key=lambda line: (tasks.index(line.task), line.context, line.mode, line.turn or 0))


def _every_turn(rows: Iterable[Row]) -> Iterator[Row]:
    for group in grouped(rows, lambda row: (row["task"], row["context"], row["mode"])).values():
        turns = sorted({row["turn"] for row in group if row["turn"] is not None}) or [None]
        for row in group:
            yield from [{**row, "turn": turn} for turn in turns] if row["turn"] is None else [row]


def ends(lines: list[Line]) -> list[Line]:
    """Only the first and the last turn of each task, context and mode."""
    found = []
    for group in grouped(lines, lambda line: line[:3]).values():
        found += [group[0], group[-1]] if len(group) > 1 else group
    return found


def methods(lines: Iterable[Line]) -> list[str]:
    """Every method once, in order of appearance."""
    return list(dict.fromkeys(name for line in lines for name in line.scores))


def costs(rows: Iterable[Row], keys: Sequence[str] = ("context", "mode", "method")) -> list[Row]:
    """By context, mode and method (or as `keys` say): medians of times and shares, largest of bytes, None where nothing
    was measured; and the mean score in per cent."""
    good = [row for row in rows if row["status"] == "ok"]
    groups = grouped(good, lambda row: tuple(row[key] for key in keys))
    return [{**dict(zip(keys, named, strict=True)), **_cost_of(group)} for named, group in groups.items()]


def _cost_of(rows: Sequence[Row]) -> Row:
    line: Row = {"score": 100 * mean(row["score"] for row in rows)}
    for key in COST_FIELDS:
        values = [row[key] for row in rows if row[key] is not None]
        take: Callable[[list[float]], float] = max if key.endswith("bytes") else median
        line[key] = take(values) if values else None
    return line


def grouped(things: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Things of the same key together, in order of appearance."""
    found: dict[Any, list[Any]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found
