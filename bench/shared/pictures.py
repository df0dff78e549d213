"""Pictures of benchmarks: one look for all of them, and a method that looks the same in each."""

import base64
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from retrieval_attn.bench.shared.report import Row, check_writable, short

PICTURES = (".png", ".svg")

# Told apart by people who see few colours; beyond the last, colours begin again with other markers.
_COLOURS = (
    *("#0072b2", "#d55e00", "#00805f", "#b0478a", "#9a6b00", "#3d94c9"),
    *("#5d6670", "#6848a8", "#c51b32", "#6e9b00", "#7a4a3a", "#00a0a0"),
)
_MARKERS = "os^DvPX*<>ph"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), (0, (1, 3)))

# Methods that many reports have in common have the same place in all of them.
_PLACES = {
    "full": 0, "folded": 1, "exact": 2, "graph": 3, "scan": 4, "page": 5, "hnsw": 6, "faiss-ivf": 7, "ivf": 7,
    "streaming": 8, "sdpa": 0, "dense": 1, "sdpa, one call": 6, "auto": 3, "mass_vertical_slash": 4,
}  # fmt: skip

_LOOK: dict[Any, Any] = {
    # The bytes of a picture depend on its data alone, and text of a report is no formula.
    "svg.hashsalt": "retrieval-attn",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.prop_cycle": f"cycler('color', {list(_COLOURS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9dee4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}

Looks = Mapping[str, dict[str, Any]]


NO_PICTURES = "pictures need matplotlib; pip install 'retrieval-attn[plot]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise ImportError with the install command where matplotlib is missing."""
    if not can_draw():
        raise ImportError(f"--plot: {NO_PICTURES}")


def check_plot(path: Path) -> None:
    """Raise now what would keep a picture from being written after a long run."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot must end in {' or '.join(PICTURES)}, got {str(path)!r}")
    check_writable(path, "--plot")
    require_matplotlib()


@contextmanager
def _look() -> Iterator[None]:
    """Set matplotlib's settings to ours for a while. They are of the process: one thread at a time."""
    from matplotlib import style

    with style.context(["default", _LOOK], after_reset=True):
        yield


def save(draw: Callable[[], Any], title: str, path: Path) -> None:
    """Write the figure that `draw` makes, under a title, to a file that check_plot lets pass; where it makes none
    because nothing was measured, the title alone."""
    with _look():
        figure = draw() or figure_of(6, 1)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def as_uri(draw: Callable[[], Any]) -> str | None:
    """The figure that `draw` makes as the address of an image, which holds all of it as SVG without a background; None
    where it makes none because nothing was measured."""
    out = io.BytesIO()
    with _look():
        figure = draw()
        if figure is None:
            return None
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def figure_of(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, which draws without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(n: int, width: float, height: float, ylabel: str = "", most: float = 11) -> tuple[Any, list[Any]]:
    """A figure and its n axes of so many inches, as many beside each other as fit in `most`; all have one scale up."""
    n_columns = max(1, min(n, int(most / width)))
    n_rows = -(-n // n_columns)
    figure = figure_of(width * n_columns, height * n_rows + 0.5)
    every = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel().tolist()
    for axes in every[n:]:
        axes.remove()
    for axes in every[:n:n_columns]:
        axes.set_ylabel(ylabel)
    return figure, every[:n]


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method: known ones always the same, others the first that are free."""
    places: dict[str, int] = {}
    for name in (names := list(dict.fromkeys(methods))):
        if name in _PLACES and _PLACES[name] not in places.values():
            places[name] = _PLACES[name]
    free = (place for place in count() if place not in places.values())
    return {name: _style(places[name] if name in places else next(free)) for name in names}


def _style(place: int) -> dict[str, Any]:
    around = place // len(_COLOURS)
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[(place + around) % len(_MARKERS)],
        "ls": _DASHES[(place + around) % len(_DASHES)],
    }


def add_key(figure: Any, looks: Looks) -> None:
    """Put one key below all panels, as wide as the longest name allows: a title may stand above them."""
    from matplotlib.lines import Line2D

    # A label that begins with an underscore would be left out.
    handles = [Line2D([], [], label=f" {name}", **look) for name, look in looks.items()]
    if handles:
        inches = 0.55 + 0.075 * max(map(len, looks))
        n_columns = min(len(looks), max(1, int(figure.get_figwidth() / inches)))
        figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)


def lines_of(rows: list[Row], key: str, ylabel: str, band: tuple[str, str] | None = None) -> Any:
    """A figure of `key` against the context, a line per method; shaded between the two keys of the band."""
    figure = figure_of(7.6, 4.4)
    axes = figure.add_subplot(xlabel="context (tokens)", ylabel=ylabel)
    looks = styles(row["method"] for row in rows)
    draw_lines(axes, rows, key, looks, band)
    add_key(figure, looks)
    return figure


def draw_lines(axes: Any, rows: list[Row], key: str, looks: Looks, band: tuple[str, str] | None = None) -> None:
    """What `lines_of` draws, on these axes."""
    for i, (method, look) in enumerate(looks.items()):
        line = [row for row in rows if row["method"] == method and row[key] is not None]
        line.sort(key=lambda row: row["context"])
        at = [row["context"] for row in line]
        # Methods may lie on the line of another: each next one is drawn smaller.
        axes.plot(at, [row[key] for row in line], **look, ms=max(4, 8 - 0.7 * i), lw=max(1, 2.2 - 0.2 * i))
        if band and all(row[end] is not None for row in line for end in band):
            low, high = ([row[end] for row in line] for end in band)
            axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    scale_contexts(axes, (row["context"] for row in rows))


def scale_contexts(axes: Any, contexts: Iterable[int]) -> None:
    """Make the axis of token counts logarithmic, with a tick at each that was measured."""
    at = sorted(set(contexts))
    # A logarithmic axis without data would warn about its limits.
    if at:
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [short(n) for n in at])
        axes.minorticks_off()
    if len(at) == 1:
        axes.set_xlim(at[0] / 2, at[0] * 2)


def log_axis(axes: Any, which: str) -> None:
    """Make the axis "x" or "y" logarithmic, with plain numbers at 1, 2 and 5 times every power of ten; matplotlib's own
    would be formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
