"""Pictures of the quality benchmarks: heat-maps of scores, and score against speed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from retrieval_attn.bench.quality.format import cost_lines
from retrieval_attn.bench.quality.scores import grouped
from retrieval_attn.bench.shared.maps import SCORES, maps_of
from retrieval_attn.bench.shared.pictures import add_key, log_axis, panels, save, styles
from retrieval_attn.bench.shared.report import Report, Row, short


def plot_grid(report: Report, path: Path) -> None:
    """Write a map of the needle's score by length and depth."""
    _save(report, "Needle in a haystack", grid, path)


def plot_tasks(report: Report, path: Path) -> None:
    """Write a map of scores by task and turn, or by task and length."""
    _save(report, report["bench"], tasks, path)


def plot_pareto(report: Report, path: Path) -> None:
    """Write a picture of score against milliseconds per token."""
    _save(report, report["config"].get("task", report["bench"]), pareto, path)


def _save(report: Report, title: str, draw: Callable[[list[Row]], Any], path: Path) -> None:
    model = report["config"]["model"]
    where = "the embedded model" if model is None else Path(model).name
    save(lambda: draw(report["results"]), f"{title}, {where}", path)


def grid(rows: list[Row]) -> Any:
    """A figure of mean scores by length and depth, a panel per method."""
    return _maps(rows, "context", ("depth",))


def tasks(rows: list[Row]) -> Any:
    """A figure of mean scores: a row per task (and length and mode), a column per turn, or per length."""
    turns = len({row["turn"] for row in rows if row["turn"] is not None}) > 1
    names = ("task", "context", "mode") if turns else ("task", "mode")
    varied = tuple(key for key in names if key == "task" or len({row[key] for row in rows}) > 1)
    return _maps(rows, "turn" if turns else "context", varied)


_LABELS = {"context": "context (tokens)", "turn": "turn", "depth": "depth (% of context)", "method": "method"}


def _maps(rows: list[Row], across: str, down: tuple[str, ...]) -> Any:
    """A panel per method; where each would be one column, one panel with a column per method. None without scores."""
    rows = [row for row in rows if row["score"] is not None and row[across] is not None and row[down[0]] is not None]
    if not rows:
        return None
    by_method = grouped(rows, lambda row: row["method"])
    columns = sorted({row[across] for row in rows})
    if len(columns) == 1:
        across, columns, by_method = "method", list(by_method), {"": rows}
    lines = list(dict.fromkeys(tuple(row[key] for key in down) for row in rows))
    lines = sorted(lines) if down == ("depth",) else lines
    values = {_named("method", method): _means(own, lines, down, columns, across) for method, own in by_method.items()}
    down_names = [", ".join(map(_named, down, line)) for line in lines]
    labels = (_LABELS[across], _LABELS.get(down[0], ""))
    return maps_of(values, down_names, [_named(across, value) for value in columns], labels, SCORES)


def _means(rows: list[Row], lines: list[Any], down: tuple[str, ...], columns: list[Any], across: str) -> np.ndarray:
    """Mean scores in per cent, (len(lines), len(columns)), NaN where there is none."""
    cells = np.full((len(lines), len(columns)), np.nan)
    for (line, column), own in grouped(rows, lambda row: (tuple(row[key] for key in down), row[across])).items():
        cells[lines.index(line), columns.index(column)] = 100 * mean(row["score"] for row in own)
    return cells


def _named(key: str, value: Any) -> str:
    forms: dict[str, Callable[[Any], str]] = {
        "context": short,
        "depth": lambda depth: f"{100 * depth:.3g}",
        "turn": "{:.0f}".format,
        "method": lambda method: method.replace(":", "\n", 1),
    }
    return forms.get(key, str)(value)


def pareto(rows: list[Row]) -> Any:
    """A figure of score against time per token: a panel per length, a mark per method, and a thin line that joins the
    methods that none beats in both. None without times."""
    points = [line for line in cost_lines(sorted(rows, key=lambda row: row["context"])) if line["tpot_ms"]]
    parts = grouped(points, lambda point: point["context"])
    if not parts:
        return None
    looks = {name: {**look, "ls": ""} for name, look in styles(point["method"] for point in points).items()}
    figure, every = panels(len(parts), 7.6 if len(parts) == 1 else 3.6, 3.8, "score (per cent)")
    for axes, (context, part) in zip(every, parts.items(), strict=True):
        best = _front(part)
        axes.plot([point["tpot_ms"] for point in best], [point["score"] for point in best], color="black", lw=0.6)
        for point in part:
            axes.plot(point["tpot_ms"], point["score"], **looks[point["method"]], ms=8, clip_on=False)
        log_axis(axes, "x")
        axes.set(ylim=(-2, 102), xlabel="milliseconds per token (median)", title=f"{context} tokens")
        axes.set_xlim(min(point["tpot_ms"] for point in part) / 1.5, max(point["tpot_ms"] for point in part) * 1.5)
    add_key(figure, looks)
    return figure


def _front(points: Sequence[Row]) -> list[Row]:
    """The methods that none beats in both, fastest first."""
    front: list[Row] = []
    for point in sorted(points, key=lambda point: (point["tpot_ms"], -point["score"])):
        if not front or point["score"] > front[-1]["score"]:
            front.append(point)
    return front
