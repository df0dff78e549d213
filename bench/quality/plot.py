"""Pictures of the quality benchmarks: heat-maps of scores, and score against speed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from retrieval_attn.bench.quality.format import cost_lines
from retrieval_attn.bench.shared.pictures import figure_of
from retrieval_attn.bench.shared.report import Report, Row, short

# From wrong to right, told apart by people who see few colours, and in print.
COLOURS = "cividis"

# Methods that lie on each other are told apart by these.
MARKERS = "osD^v<>PX*hp8"


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _where(report: Report) -> str:
    model = report["config"]["model"]
    return "the embedded model" if model is None else Path(model).name


def plot_grid(report: Report, path: Path) -> None:
    """A map per method of the needle's score by length and depth."""
    _maps(report, path, "Needle in a haystack", "context", ("depth",))


def plot_tasks(report: Report, path: Path) -> None:
    """A map per method of its scores: a row per task (and length and mode), a column per turn, or per length."""
    rows = report["results"]
    turns = len({row["turn"] for row in rows if row["turn"] is not None}) > 1
    names = ("task", "context", "mode") if turns else ("task", "mode")
    varied = tuple(key for key in names if key == "task" or len({row[key] for row in rows}) > 1)
    _maps(report, path, report["bench"], "turn" if turns else "context", varied)


_AXES = {"context": "context (tokens)", "turn": "turn", "depth": "depth of the needle"}


def _maps(report: Report, path: Path, title: str, across: str, down: tuple[str, ...]) -> None:
    """Mean scores, a panel per method; cells without an answer stay white."""
    rows = [row for row in report["results"] if row["score"] is not None]
    columns = sorted({row[across] for row in rows})
    lines = list(dict.fromkeys(tuple(row[key] for key in down) for row in rows))
    lines = sorted(lines) if down == ("depth",) else lines
    methods = _methods(rows)
    wide = max(1.6, 0.5 * len(columns))
    figure = figure_of(3.0 + wide * len(methods), 1.6 + max(1.6, 0.24 * len(lines)))
    panels = figure.subplots(1, max(1, len(methods)), sharey=True, squeeze=False)[0]
    drawn = None
    for panel, method in zip(panels, methods, strict=False):
        own = [row for row in rows if row["method"] == method]
        cells = [[_score(own, line, down, column, across) for column in columns] for line in lines]
        drawn = panel.imshow(cells, vmin=0, vmax=100, aspect="auto", cmap=COLOURS)
        panel.set_title(method.replace(":", "\n"), fontsize=9)
        panel.set_xticks(range(len(columns)), [_named(across, value) for value in columns], fontsize=8)
        panel.set_yticks(range(len(lines)), [", ".join(map(_named, down, line)) for line in lines], fontsize=8)
        panel.set_xlabel(_AXES[across], fontsize=8)
    panels[0].set_ylabel(_AXES.get(down[0], ""), fontsize=8)
    if drawn is not None:
        figure.colorbar(drawn, ax=panels.tolist(), label="score, %")
    figure.suptitle(f"{title}, {_where(report)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _score(rows: Sequence[Row], line: tuple[Any, ...], down: tuple[str, ...], column: Any, across: str) -> float:
    own = [row["score"] for row in rows if row[across] == column and tuple(row[key] for key in down) == line]
    return 100 * mean(own) if own else float("nan")


def _named(key: str, value: Any) -> str:
    return short(value) if key == "context" else f"{100 * value:.0f} %" if key == "depth" else str(value)


def plot_pareto(report: Report, path: Path) -> None:
    """Score against milliseconds per token, a point per method; up and to the left is better."""
    lines = [line for line in cost_lines(report["results"]) if line["tpot_ms"] is not None]
    figure = figure_of(8.5, 4.6)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        axes.scatter(
            line["tpot_ms"], line["score"], s=60, marker=MARKERS[i % len(MARKERS)], label=line["method"], alpha=0.8
        )
    best = _front(lines)
    axes.plot([line["tpot_ms"] for line in best], [line["score"] for line in best], color="0.6", lw=1, zorder=0)
    if lines:
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis("{x:g}")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set_ylim(-5, 105)
    axes.set_xlabel("milliseconds per token")
    axes.set_ylabel("score, %")
    axes.set_title(f"{report['config'].get('task', report['bench'])}, {_where(report)}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _front(lines: Sequence[Row]) -> list[Row]:
    """The methods that none beats in both, fastest first."""
    front: list[Row] = []
    for line in sorted(lines, key=lambda line: (line["tpot_ms"], -line["score"])):
        if not front or line["score"] > front[-1]["score"]:
            front.append(line)
    return front
