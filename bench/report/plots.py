"""The pictures of a report: curves against context, time or answer. Maps and scores have files of their own."""

from collections.abc import Callable
from typing import Any

from retrieval_attn.bench.quality.scores import grouped
from retrieval_attn.bench.recall.curves import curves
from retrieval_attn.bench.recall.format import RECALL
from retrieval_attn.bench.report.plots_maps import fidelity_map, needle_map
from retrieval_attn.bench.report.plots_scores import by_task, by_turn, frontier, peaks
from retrieval_attn.bench.report.read import Report
from retrieval_attn.bench.report.svg import Plot, context_axis, draw, legend, log_axis, panel_size, panels, styles
from retrieval_attn.bench.shared.report import Row, short


def plot(report: Report) -> Plot | None:
    """The picture of a report, None where there is nothing to draw. Needs matplotlib."""
    paint = _PLOTS.get(report.kind)
    return paint(report) if paint and report.good else None


def _latency(report: Report) -> Plot:
    per = "token" if report.config.get("mode") == "model" else "step and layer"

    def paint(figure: Any) -> None:
        axes = _lines(figure, report.good, "total_ms", band=True)
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.set(xlabel="context (tokens)", ylabel=f"milliseconds per {per}")

    alt = f"Line chart: milliseconds per {per} against context, a line per method."
    return Plot(draw(paint, (7.6, 4.6), report.name, alt), "Median; shaded from p20 to p80. Both axes are logarithmic.")


def _ppl(report: Report) -> Plot:
    def paint(figure: Any) -> None:
        axes = _lines(figure, report.good, "ppl")
        axes.set(xlabel="context (tokens)", ylabel="perplexity (per token)")

    alt = "Line chart: perplexity against context, a line per method."
    return Plot(draw(paint, (7.6, 4.4), report.name, alt), "Lower is better.")


def _kernels(report: Report) -> Plot | None:
    rows = [row for row in report.good if row["part"] == "prefill" and row["speedup_vs_sdpa"] is not None]
    if len({row["context"] for row in rows}) < 2:
        return None

    def paint(figure: Any) -> None:
        axes = _lines(figure, rows, "speedup_vs_sdpa")
        axes.set(xlabel="prompt (tokens)", ylabel="times as fast as sdpa, chunk by chunk")
        axes.set_ylim(bottom=0)

    alt = "Line chart: speed of prefill beside sdpa against the length of the prompt, a line per kernel."
    return Plot(draw(paint, (7.6, 4.6), report.name, alt), "Higher is faster; 1 is PyTorch's sdpa on the same chunks.")


def _lines(figure: Any, rows: list[Row], key: str, band: bool = False) -> Any:
    """A line per method against the context, and a key above; returns the axes."""
    axes = figure.add_subplot()
    looks = styles(row["method"] for row in rows)
    for method, line in grouped(rows, lambda row: row["method"]).items():
        line = sorted((row for row in line if row[key] is not None), key=lambda row: row["context"])
        at = [row["context"] for row in line]
        axes.plot(at, [row[key] for row in line], **looks[method])
        if band and all(row["total_p20_ms"] is not None and row["total_p80_ms"] is not None for row in line):
            low, high = ([row[f"total_{p}_ms"] for row in line] for p in ("p20", "p80"))
            axes.fill_between(at, low, high, color=looks[method]["color"], alpha=0.15, linewidth=0)
    context_axis(axes, sorted({row["context"] for row in rows}))
    legend(figure, looks)
    return axes


def _recall(report: Report) -> Plot | None:
    rows = [row for row in report.good if row["search_us"]]
    parts = grouped(rows, lambda row: (row["source"], row["context"], row["seed"]))
    looks = styles(row["method"] for row in rows)
    if not parts:
        return None
    n_columns = min(3, len(parts))

    def paint(figure: Any) -> None:
        every = panels(figure, len(parts), n_columns, "recall", sharey=True)
        for axes, ((source, context, seed), part) in zip(every, parts.items(), strict=True):
            _recall_panel(axes, part, looks)
            axes.set_title(f"{source}, {short(context)} keys, seed {seed:.0f}")
            axes.set_xlabel("search (ms per step and layer)")
        legend(figure, looks)

    width = 3.5 if n_columns > 1 else 7.6
    size = panel_size(len(parts), n_columns, width, 3.1 if n_columns > 1 else 4.2)
    alt = "Line charts: recall against milliseconds of search, a line per method, a panel per source of vectors."
    caption = f"Each point is an effort; up and to the left is better. The line across is at recall {RECALL}."
    return Plot(draw(paint, size, report.name, alt), caption)


def _recall_panel(axes: Any, rows: list[Row], looks: dict[str, dict[str, Any]]) -> None:
    for (*_, method), line in curves(rows).items():
        axes.plot([row["search_us"] / 1e3 for row in line], [row["recall"] for row in line], **looks[method])
    axes.axhline(RECALL, color=axes.xaxis.label.get_color(), lw=0.6)
    axes.set_xscale("log")
    log_axis(axes.xaxis)


def _long(report: Report) -> Plot:
    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        method = str(report.config.get("index", "answer"))
        line = [(row["new_tokens"], row["tokens_per_s"]) for row in report.rows]
        axes.plot(*zip(*line, strict=True), **styles([method])[method])
        axes.set(xlabel="tokens of the answer", ylabel="tokens per second")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylim(0, 1.1 * max(speed for _, speed in line) or 1)
        axes.set_xlim(left=0)

    alt = "Line chart: tokens per second along a long answer."
    return Plot(draw(paint, (7.6, 3.2), report.name, alt), "Each point is the mean over the tokens since the last.")


_PLOTS: dict[str, Callable[[Report], Plot | None]] = {
    "latency": _latency,
    "recall": _recall,
    "compare": frontier,
    "needle": needle_map,
    "ruler": by_task,
    "scbench": by_turn,
    "ppl": _ppl,
    "fidelity": fidelity_map,
    "memory": peaks,
    "long": _long,
    "kernels": _kernels,
}
