"""A matplotlib figure as SVG inside a page: its colours are the page's, its bytes depend on its data alone."""

import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from retrieval_attn.bench.shared.report import short

# Colours that the page's style sheet defines, for light and for dark; matplotlib draws with stand-ins.
N_SERIES = 8
INK, GRID = "#0a0b0c", "#0a0b0d"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(N_SERIES))
_COLOURS = {INK: "currentColor", GRID: "var(--grid)", **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}}

_MARKERS = "os^DvPX*"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), (0, (1, 3)))

# Methods that many reports have in common look the same in all of them.
_PLACES = {
    "full": 0, "folded": 1, "exact": 2, "graph": 3, "scan": 4, "page": 5, "hnsw": 6, "faiss-ivf": 7,
    "sdpa": 0, "dense": 1, "sdpa, one call": 6, "auto": 3, "mass_vertical_slash": 4,
}  # fmt: skip

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


class Plot(NamedTuple):
    """A picture, and how to read it."""

    svg: str
    caption: str


def check_matplotlib() -> None:
    """Raise ImportError with the install command where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("bench report needs matplotlib for its plots; pip install 'retrieval-attn[plot]'")


def draw(paint: Callable[[Any], None], size: tuple[float, float], salt: str, alt: str) -> str:
    """What `paint` puts on a matplotlib figure of this size (inches), as an <svg> element.

    salt: a name that no other figure of the page has; alt: what the picture shows, in a sentence.
    Leaves matplotlib's settings as they were; they are of the process, so this is for one thread at a time.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_RC, "svg.hashsalt": salt})
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inlined(out.getvalue(), size, alt)


def _inlined(svg: str, size: tuple[float, float], alt: str) -> str:
    """Without what belongs to a file: declarations, namespaces, styles for all, and ids that nothing refers to."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub("#0a0[bc][0-9a-f]{2}", lambda found: _COLOURS.get(found[0], found[0]), body)
    wide, high = (72 * inches for inches in size)
    style = f"width: {1.3 * wide:.0f}px; min-width: {0.95 * wide:.0f}px"
    head = f'<svg viewBox="0 0 {wide:g} {high:g}" style="{style}" role="img" aria-label="{escape(alt, quote=True)}">'
    return head + re.sub(r"\s*\n\s*", "\n", body.strip())


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method: known ones always the same, others the first that are free."""
    names = list(dict.fromkeys(names))
    places: dict[str, int] = {}
    for name in names:
        if name in _PLACES and _PLACES[name] not in places.values():
            places[name] = _PLACES[name]
    free = (i for i in range(N_SERIES + len(names)) if i not in places.values())
    for name in names:
        if name not in places:
            places[name] = next(free)
    return {name: _style(places[name]) for name in names}


def _style(place: int) -> dict[str, Any]:
    # Beyond the last colour, colours begin again with other markers and dashes.
    shape = (place + place // N_SERIES) % N_SERIES
    return {"color": SERIES[place % N_SERIES], "marker": _MARKERS[shape], "ls": _DASHES[shape]}


def panels(figure: Any, n: int, n_columns: int, ylabel: str = "", **shared: Any) -> list[Any]:
    """n axes, row by row, the first of each row with the label; those that a last row does not fill are left out."""
    grid = figure.subplots(-(-n // n_columns), n_columns, squeeze=False, **shared)
    every = [axes for row in grid for axes in row]
    for axes in every[n:]:
        axes.remove()
    for axes in every[:n:n_columns]:
        axes.set_ylabel(ylabel)
    return every[:n]


def panel_size(n: int, n_columns: int, width: float, height: float) -> tuple[float, float]:
    """Inches for n panels of this size, and a legend above them."""
    return width * min(n, n_columns), height * -(-n // n_columns) + 0.5


def legend(figure: Any, looks: dict[str, dict[str, Any]], lines: bool = True) -> None:
    """One key to all panels, above them, as wide as the longest name allows."""
    from matplotlib.lines import Line2D

    # A label that begins with an underscore would be left out.
    handles = [
        Line2D([], [], label=f" {name}", **(look if lines else {**look, "ls": ""})) for name, look in looks.items()
    ]
    if handles:
        inches = 0.75 + 0.085 * max(map(len, looks))
        n_columns = min(len(looks), max(1, int(figure.get_figwidth() / inches)))
        figure.legend(handles=handles, loc="outside upper center", ncols=n_columns)


def log_axis(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 times every power of ten, on an axis that is logarithmic already."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def context_axis(axes: Any, contexts: Sequence[int]) -> None:
    """A logarithmic axis of token counts with a tick at each that was measured."""
    if not contexts:
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(contexts), [short(n) for n in sorted(contexts)])
    axes.minorticks_off()
    if len(set(contexts)) == 1:
        axes.set_xlim(contexts[0] / 2, contexts[0] * 2)
