"""Heat-maps: scores by context and depth, errors by layer and head; all panels of a picture share one scale."""

from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.bench.quality.scores import grouped
from retrieval_attn.bench.report.read import Report
from retrieval_attn.bench.report.svg import Plot, draw, panel_size, panels
from retrieval_attn.bench.shared.report import Row, short

# Cells of a panel up to which each says its number.
_MOST_NUMBERS = 96

# Errors of heads differ by orders of magnitude; fixed steps let reports compare.
_ERRORS = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])


class _Map(NamedTuple):
    """One panel: values (rows, columns), NaN where there are none; what rows and columns are."""

    title: str
    values: np.ndarray
    down: list[str]
    across: list[str]


class _Scale(NamedTuple):
    """What the colours mean. steps: where one colour ends and the next begins. number: how a cell is written."""

    label: str
    colours: str
    steps: np.ndarray
    number: str


def needle_map(report: Report) -> Plot | None:
    """A panel per method: mean score by context and depth."""
    rows = [row for row in report.good if row["depth"] is not None]
    contexts, depths = ([*sorted({row[name] for row in rows})] for name in ("context", "depth"))
    maps = [
        _Map(method, _means(part, "depth", depths, "context", contexts, "score", 100),
             [f"{100 * depth:.3g}" for depth in depths], [short(n) for n in contexts])
        for method, part in grouped(rows, lambda row: row["method"]).items()
    ]  # fmt: skip
    if not maps:
        return None
    scale = _Scale("score (per cent)", "cividis", np.linspace(0, 100, 11), "{:.0f}")
    alt = "Heat-maps: mean score by context and by depth of the needle, a panel per method."
    svg = _drawn(maps, scale, ("context (tokens)", "depth (% of context)"), report.name, alt)
    return Plot(svg, "Mean over the examples of a cell; a cell without an answer is empty.")


def fidelity_map(report: Report) -> Plot:
    """A panel per context and method: error by layer and head."""
    rows = report.good
    layers, heads = ([*sorted({row[name] for row in rows})] for name in ("layer", "head"))
    maps = [
        _Map(f"{method}, {short(context)}", _means(part, "layer", layers, "head", heads, "error", 1),
             [f"{x:.0f}" for x in layers], [f"{x:.0f}" for x in heads])
        for (context, method), part in grouped(rows, lambda row: (row["context"], row["method"])).items()
    ]  # fmt: skip
    scale = _Scale("relative error of the output", "cividis", _ERRORS, "{:.2g}")
    alt = "Heat-maps: relative error of the output by layer and by head, a panel per method and context."
    return Plot(
        _drawn(maps, scale, ("head", "layer"), report.name, alt),
        "Darker is better. Errors above 1 have the colour of 1; heads without a number are empty.",
    )


def _means(
    rows: list[Row], down: str, downs: list[Any], across: str, acrosses: list[Any], key: str, times: float
) -> np.ndarray:
    """(len(downs), len(acrosses)) means of `key`, NaN where no row is."""
    values = np.full((len(downs), len(acrosses)), np.nan)
    for (y, x), part in grouped(rows, lambda row: (row[down], row[across])).items():
        values[downs.index(y), acrosses.index(x)] = times * np.mean([row[key] for row in part])
    return values


def _drawn(maps: list[_Map], scale: _Scale, labels: tuple[str, str], salt: str, alt: str) -> str:
    n_columns = min(3, len(maps))
    down, across = maps[0].values.shape
    width = max(2.8, min(0.42 * across + 1.2, 10 / n_columns))
    size = panel_size(len(maps), n_columns, width, max(2.2, min(0.24 * down + 1, 6)))

    def paint(figure: Any) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm

        colours = colormaps[scale.colours].resampled(len(scale.steps) - 1)
        norm = BoundaryNorm(scale.steps, colours.N, clip=True)
        every = panels(figure, len(maps), n_columns, labels[1])
        for axes, one in zip(every, maps, strict=True):
            mesh = axes.pcolormesh(one.values, cmap=colours, norm=norm, edgecolors="none")
            _label(axes, one, labels[0])
            _number(axes, one.values, mesh, scale.number)
        bar = {"label": scale.label, "ticks": scale.steps, "format": lambda x, _: f"{x:.3g}", "aspect": 30}
        figure.colorbar(mesh, ax=every, **bar)

    return draw(paint, (size[0] + 1, size[1]), salt, alt)


def _label(axes: Any, one: _Map, xlabel: str) -> None:
    """A name at the middle of each cell, or of every second and so on where there are many; the first row is on top."""
    axes.set_title(one.title)
    axes.grid(False)
    axes.invert_yaxis()
    for axis, names, most in ((axes.xaxis, one.across, 12), (axes.yaxis, one.down, 16)):
        every = -(-len(names) // most)
        axis.set_ticks([i + 0.5 for i in range(0, len(names), every)], names[::every])
    axes.tick_params(length=0)
    axes.set_xlabel(xlabel)


def _number(axes: Any, values: np.ndarray, mesh: Any, form: str) -> None:
    """The value of each cell in it, in black or white, whichever is seen."""
    if values.size > _MOST_NUMBERS:
        return
    for (y, x), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = mesh.cmap(mesh.norm(value))
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        axes.text(x + 0.5, y + 0.5, form.format(value), color=colour, ha="center", va="center", fontsize=8)
