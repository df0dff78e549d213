"""Pictures of the quality benchmarks: a heat-map of a needle grid, bars of task scores, score against speed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from retrieval_attn.bench.quality_format import cost_lines
from retrieval_attn.bench.report_format import Row, short

Report = dict[str, Any]

# From wrong to right, told apart by people who see few colours, and in print.
COLOURS = "cividis"


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _where(report: Report) -> str:
    model = report["config"]["model"]
    return "the embedded model" if model is None else Path(model).name


def plot_grid(report: Report, path: Path) -> None:
    """A map per method of the needle's score by length and depth."""
    rows = [row for row in report["results"] if row["score"] is not None]
    contexts = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    methods = _methods(rows)
    figure = figure_of(1.6 + max(1.6, 0.55 * len(contexts)) * len(methods), 1.6 + max(1.8, 0.26 * len(depths)))
    panels = figure.subplots(1, max(1, len(methods)), sharey=True, squeeze=False)[0]
    drawn = None
    for panel, method in zip(panels, methods, strict=False):
        cells = [[_score(rows, method, context, depth) for context in contexts] for depth in depths]
        drawn = panel.imshow(cells, vmin=0, vmax=100, aspect="auto", cmap=COLOURS)
        panel.set_title(method, fontsize=9)
        panel.set_xticks(range(len(contexts)), [short(n) for n in contexts], fontsize=8)
        panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
        panel.set_xlabel("context (tokens)", fontsize=8)
    panels[0].set_ylabel("depth of the needle", fontsize=8)
    if drawn is not None:
        figure.colorbar(drawn, ax=panels.tolist(), label="right, %")
    figure.suptitle(f"Needle in a haystack, {_where(report)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _score(rows: Sequence[Row], method: str, context: int, depth: float) -> float:
    own = [row["score"] for row in rows if (row["method"], row["context"], row["depth"]) == (method, context, depth)]
    return 100 * mean(own) if own else float("nan")


def plot_bars(report: Report, path: Path) -> None:
    """A group of bars per task, length, mode and turn, a bar per method."""
    rows = [row for row in report["results"] if row["score"] is not None]
    keys = [key for key in ("task", "context", "mode", "turn") if len({row[key] for row in rows}) > 1] or ["task"]
    groups = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    methods = _methods(rows)
    figure = figure_of(2 + max(4, 0.22 * len(groups) * (len(methods) + 1)), 4.2)
    axes = figure.add_subplot()
    wide = 0.8 / max(1, len(methods))
    for i, method in enumerate(methods):
        own = [[row["score"] for row in rows if row["method"] == method and tuple(row[k] for k in keys) == group]
               for group in groups]  # fmt: skip
        at = [j + (i - (len(methods) - 1) / 2) * wide for j in range(len(groups))]
        axes.bar(at, [100 * mean(x) if x else float("nan") for x in own], wide, label=method)
    names = ["\n".join(short(x) if key == "context" else f"turn {x}" if key == "turn" else str(x)
             for key, x in zip(keys, group, strict=True)) for group in groups]  # fmt: skip
    axes.set_xticks(range(len(groups)), names, fontsize=7, rotation=30 if len(groups) > 4 else 0)
    axes.set_ylabel("score, %")
    axes.set_ylim(0, 105)
    axes.set_title(f"{report['bench']}, {_where(report)}", fontsize=10)
    if rows:
        axes.legend(
            frameon=False, fontsize=8, ncols=min(6, len(methods)), loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)


def plot_pareto(report: Report, path: Path) -> None:
    """Score against milliseconds per token, a point per method; up and to the left is better."""
    lines = [line for line in cost_lines(report["results"]) if line["tpot_ms"] is not None]
    figure = figure_of(7, 4.6)
    axes = figure.add_subplot()
    for line in lines:
        axes.scatter(line["tpot_ms"], line["score"], s=40)
        axes.annotate(
            f" {line['method']}", (line["tpot_ms"], line["score"]), fontsize=8, rotation=25, va="bottom",
        )  # fmt: skip
    best = _front(lines)
    axes.plot([line["tpot_ms"] for line in best], [line["score"] for line in best], color="0.6", lw=1, zorder=0)
    if lines:
        axes.set_xscale("log")
    axes.set_ylim(-5, 125)
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
