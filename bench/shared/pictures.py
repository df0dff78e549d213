"""What all pictures of benchmarks have in common."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retrieval_attn.bench.shared.report import check_writable, short

PICTURES = (".png", ".svg")


def require_matplotlib() -> None:
    """Raise ImportError with the install command where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'retrieval-attn[plot]'")


def check_plot(path: Path) -> None:
    """Raise now what would keep a picture from being written after a long run."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot must end in {' or '.join(PICTURES)}, got {str(path)!r}")
    check_writable(path, "--plot")
    require_matplotlib()


def figure_of(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, which draws without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def scale_contexts(axes: Any, contexts: Iterable[int]) -> None:
    """Make the axis of token counts logarithmic, with a tick at each that was measured."""
    at = sorted(set(contexts))
    # A logarithmic axis without data would warn about its limits.
    if at:
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [short(n) for n in at])
    if len(at) > 1:
        axes.minorticks_off()
