"""Reports of `bench fidelity` as Markdown, JSON, CSV or heat-maps of heads."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from retrieval_attn.bench.ppl.format import as_text, title
from retrieval_attn.bench.shared.report import Report, Row, short, table

MEASURES = ("error", "mass", "recall", "planted")

FIELDS = ("context", "method", "layer", "head", *MEASURES, "status", "reason")

_COLUMNS = [
    ("context", "context", "{}"),
    ("method", "method", "{}"),
    ("heads", "heads", "{}"),
    *((f"{name}, {kind}", f"{kind}_{name}", "{:.4f}") for name in MEASURES for kind in ("mean", "worst")),
    ("status", "status", "{}"),
]


def render(report: Report, form: str, scores_only: bool = False) -> str:
    """The report as text, see `quality.format.render`; Markdown says nothing of single heads."""
    parts = [f"{title(report)}: over layers and heads", table(_COLUMNS, summary(report["results"]))]
    return as_text(report, form, scores_only, FIELDS, parts)


def summary(rows: Sequence[Row]) -> list[Row]:
    """A line per context and method: mean and worst of each measure over its heads."""
    lines = []
    for context, method in dict.fromkeys((row["context"], row["method"]) for row in rows):
        own = [row for row in rows if (row["context"], row["method"]) == (context, method)]
        line = {"context": short(context), "method": method, "heads": len(own), "status": own[0]["status"]}
        for name in MEASURES:
            known = [row[name] for row in own if row[name] is not None]
            worst = max if name == "error" else min
            line |= {f"mean_{name}": mean(known) if known else None, f"worst_{name}": worst(known) if known else None}
        lines.append(line)
    return lines


def plot_heads(report: Report, path: Path) -> None:
    """Write heat-maps of heads by layers to a .png or .svg file."""
    from retrieval_attn.bench.shared.pictures import save

    rows = [row for row in report["results"] if row["status"] == "ok"]
    save(lambda: _maps(rows), f"{title(report)}; bright is good", path)


def _maps(rows: list[Row]) -> Any:
    """A figure with a row of panels per measure, a column per method and context."""
    from retrieval_attn.bench.shared.pictures import figure_of

    columns = list(dict.fromkeys((row["method"], row["context"]) for row in rows)) or [("", 0)]
    layers, heads = ([*dict.fromkeys(row[name] for row in rows)] for name in ("layer", "head"))
    wide, high = max(1.5, 0.08 * len(heads)), max(1.2, 0.08 * len(layers))
    figure = figure_of(1.6 + wide * len(columns), 0.8 + (high + 0.35) * len(MEASURES))
    grid = figure.subplots(len(MEASURES), len(columns), sharex=True, sharey=True, squeeze=False)
    for name, panels in zip(MEASURES, grid, strict=True):
        for panel, (method, context) in zip(panels, columns, strict=True):
            own = [row[name] for row in rows if (row["method"], row["context"]) == (method, context)]
            drawn = _draw(panel, name, own, layers, heads)
        panels[0].set_ylabel("layer", fontsize=8)
        bar = figure.colorbar(drawn, ax=panels.tolist(), format="{x:g}")
        bar.set_label(_LABELS[name], fontsize=8)
        bar.ax.tick_params(labelsize=7)
    for i, (method, context) in enumerate(columns):
        grid[0][i].set_title(f"{method}, {short(context)}".replace(":", "\n"), fontsize=8)
        grid[-1][i].set_xlabel("query head", fontsize=8)
    return figure


_LABELS = {"error": "error (relative L2)", "mass": "mass read", "recall": "recall", "planted": "planted, found"}


# Errors of heads differ by orders of magnitude.
_LEAST_ERROR = 1e-3


def _draw(panel: Any, name: str, numbers: Sequence[float | None], layers: list[int], heads: list[int]) -> Any:
    """One map; numbers in the order of rows: layer by layer, head by head."""
    import numpy as np
    from matplotlib.colors import LogNorm

    cells = np.array(numbers or [np.nan], float).reshape(max(1, len(layers)), -1)
    if name == "error":
        drawn = panel.imshow(cells.clip(_LEAST_ERROR), aspect="auto", cmap="cividis_r", norm=LogNorm(_LEAST_ERROR, 1))
    else:
        drawn = panel.imshow(cells, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for axis, named in ((panel.xaxis, heads), (panel.yaxis, layers)):
        step = 1 + len(named) // 9
        panel.grid(visible=False)
        axis.set_ticks(range(0, len(named), step), named[::step], fontsize=7)
    return drawn
