"""Heat-maps: panels of cells, all of them with one scale, on which yellow is good and blue is bad."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.bench.shared.pictures import panels

# Cells of a panel up to which each says its number.
_MOST_NUMBERS = 120

# Columns of a panel up to which each is named.
_MOST_TICKS = 14


class Scale(NamedTuple):
    """What colours mean: from `low` to `high`, in decades if asked; number: how a cell is written."""

    label: str
    low: float
    high: float
    number: str
    decades: bool = False


SCORES = Scale("score (per cent)", 0, 100, "{:.0f}")
ERRORS = Scale("relative error of the output", 0.001, 1, "{:.2g}", decades=True)


def maps_of(
    values: dict[str, np.ndarray], down: Sequence[str], across: Sequence[str], labels: tuple[str, str], scale: Scale
) -> Any:
    """A figure with a panel for each title, its values (len(down), len(across)), NaN where there are none.

    labels: of what runs across and of what runs down. Values beyond the scale have the colour of its end.
    """
    from matplotlib.colors import LogNorm, Normalize

    norm = (LogNorm if scale.decades else Normalize)(scale.low, scale.high, clip=True)
    longest = max(len(part) for name in across for part in name.split("\n"))
    width = 1 + max(1.4, min(max(0.45, 0.09 * longest) * min(len(across), _MOST_TICKS), 10))
    figure, every = panels(len(values), width, 0.9 + max(1.4, min(0.24 * len(down), 7)), labels[1])
    for axes, (title, cells) in zip(every, values.items(), strict=True):
        colours = "cividis_r" if scale.decades else "cividis"
        mesh = axes.pcolormesh(np.clip(cells, scale.low, None), norm=norm, cmap=colours)
        axes.set(title=title, xlabel=labels[0])
        _tick(axes.xaxis, across, _MOST_TICKS)
        _tick(axes.yaxis, down, 30)
        axes.tick_params(length=0)
        axes.grid(False)
        if cells.size <= _MOST_NUMBERS:
            _number(axes, cells, mesh, scale.number)
    # Panels share what runs down, the first of it above.
    every[0].invert_yaxis()
    figure.colorbar(mesh, ax=every, label=scale.label, format="{x:g}", aspect=30)
    return figure


def _tick(axis: Any, names: Sequence[str], most: int) -> None:
    """A name at the middle of each cell, or of every second and so on where there are many."""
    every = -(-len(names) // most)
    axis.set_ticks([i + 0.5 for i in range(0, len(names), every)], names[::every])


def _number(axes: Any, cells: np.ndarray, mesh: Any, form: str) -> None:
    """The value of each cell in it, in black or white, whichever is seen."""
    for (y, x), value in np.ndenumerate(cells):
        if np.isnan(value):
            continue
        red, green, blue, _ = mesh.to_rgba(value)
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        axes.text(x + 0.5, y + 0.5, form.format(value), color=colour, ha="center", va="center", fontsize=8)
