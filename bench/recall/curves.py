"""What lies between the measured efforts: time at equal recall or equal error, and how time grows with length."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from retrieval_attn.bench.shared.report import Row

# What makes a curve one curve.
CURVE = ("source", "context", "seed", "method")


def curves(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that could be measured, by source, context, seed and method; least effort first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(tuple(row[name] for name in CURVE), []).append(row)
    return {name: sorted(line, key=lambda row: row["effort"] or 0) for name, line in found.items()}


def at_recall(rows: Iterable[Row], recall: float = 0.95) -> list[Row]:
    """For each curve, `search_us`, `visited_pct` and `bytes_read` where it reaches this recall, None if it never does.

    Between two efforts the logarithm of each is linear in the recall. `bound` is True where the lowest effort is
    better already: then the figures are those of that effort, more than is needed.
    """
    wanted = ("search_us", "visited_pct", "bytes_read")
    searched = (row for row in rows if row["search_us"] is not None)
    return [_crossing(name, line, "recall", recall, wanted, rising=True) for name, line in curves(searched).items()]


def at_error(rows: Iterable[Row], error: float = 0.02, estimators: Sequence[str] = ("topk",)) -> list[Row]:
    """For each curve, the time `step_us` of a whole attention step whose output error is this, by the best of the
    estimators, which is named; None if no effort gets there. Otherwise as `at_recall`.
    """
    found = []
    for name, line in curves(rows).items():
        tries = []
        for estimator in estimators:
            time = f"step_{estimator}_us"
            row = _crossing(name, line, f"err_{estimator}", error, (time,), rising=False)
            tries.append({**row, "step_us": row.pop(time), "estimator": estimator})
        reached = [row for row in tries if row["step_us"] is not None]
        found.append(min(reached, key=lambda row: row["step_us"], default={**tries[0], "estimator": None}))
    return found


def growth(found: Iterable[Row], name: str = "search_us") -> list[Row]:
    """How much longer the longest context takes than the shortest, by source, seed and method, from rows of `at_recall`
    or `at_error`; None where one of the two was never reached, or where the least effort was already too much."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        lines.setdefault((row["source"], row["seed"], row["method"]), []).append(row)
    out = []
    for (source, seed, method), line in lines.items():
        first, last = min(line, key=lambda row: row["context"]), max(line, key=lambda row: row["context"])
        if first is last:
            continue
        known = all(row[name] and not row["bound"] for row in (first, last))
        ratio = last[name] / first[name] if known else None
        out.append(
            {
                "source": source,
                "seed": seed,
                "method": method,
                "from": first["context"],
                "to": last["context"],
                "ratio": ratio,
            }
        )
    return out


def _crossing(
    name: tuple[Any, ...], line: list[Row], level: str, target: float, wanted: tuple[str, ...], rising: bool
) -> Row:
    """Where `level` first gets to the target along a curve, least effort first."""
    row: Row = dict(zip(CURVE, name, strict=True)) | {level: target, "bound": False} | dict.fromkeys(wanted)
    line = [point for point in line if point[level] is not None and all(point[x] is not None for x in wanted)]
    sign = 1 if rising else -1
    good = [sign * point[level] >= sign * target for point in line]
    if not any(good):
        return row
    at = good.index(True)
    after, before = line[at], line[at - 1] if at else line[0]
    row["bound"] = at == 0
    gap = after[level] - before[level]
    share = (target - before[level]) / gap if gap else 1.0
    for x in wanted:
        row[x] = _between(before[x], after[x], share) if at else after[x]
    return row


def _between(a: float, b: float, share: float) -> float:
    if a <= 0 or b <= 0:
        return a + share * (b - a)
    return math.exp((1 - share) * math.log(a) + share * math.log(b))
