"""The picture of each kind of report, and how to read it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.bench.kernels.format import chart as kernels
from retrieval_attn.bench.latency.format import chart as latency
from retrieval_attn.bench.memory.format import PHASES
from retrieval_attn.bench.quality.plot import grid, pareto, tasks
from retrieval_attn.bench.quality.scores import grouped
from retrieval_attn.bench.recall.curves import curves
from retrieval_attn.bench.recall.format import RECALL
from retrieval_attn.bench.report.read import ReportFile
from retrieval_attn.bench.shared.maps import ERRORS, maps_of
from retrieval_attn.bench.shared.pictures import add_key, as_uri, figure_of, lines_of, log_axis, panels, styles
from retrieval_attn.bench.shared.report import Row, short


class Picture(NamedTuple):
    """An image's address, which holds all of it, and how to read it."""

    uri: str
    caption: str


def picture(report: ReportFile) -> Picture | None:
    """The picture of a report, None where there is nothing to draw. Needs matplotlib."""
    draw, caption = _PICTURES[report.kind]
    uri = as_uri(lambda: draw(report)) if report.good else None
    return Picture(uri, caption) if uri else None


def _kernels(report: ReportFile) -> Any:
    # At one length there is no line, and the table says it all.
    lengths = {row["context"] for row in report.good if row["part"] == "prefill"}
    return kernels(report.good) if len(lengths) > 1 else None


def _recall(report: ReportFile) -> Any:
    rows = [row for row in report.good if row["search_us"]]
    parts = grouped(rows, lambda row: (row["source"], row["context"], row["seed"]))
    if not parts:
        return None
    looks = styles(row["method"] for row in rows)
    figure, every = panels(len(parts), 7.6 if len(parts) == 1 else 3.6, 3.2, "recall")
    for axes, ((source, context, seed), part) in zip(every, parts.items(), strict=True):
        for (*_, method), line in curves(part).items():
            axes.plot([row["search_us"] / 1e3 for row in line], [row["recall"] for row in line], **looks[method])
        axes.axhline(RECALL, color="black", lw=0.6)
        log_axis(axes, "x")
        axes.set(title=f"{source}, {short(context)} keys, seed {seed:.0f}", xlabel="search (ms per step and layer)")
    add_key(figure, looks)
    return figure


def _fidelity(report: ReportFile) -> Any:
    layers, heads = ([*sorted({row[name] for row in report.good})] for name in ("layer", "head"))
    values = {}
    for (context, method), part in grouped(report.good, lambda row: (row["context"], row["method"])).items():
        cells = values[f"{method}, {short(context)}"] = np.full((len(layers), len(heads)), np.nan)
        for (layer, head), own in grouped(part, lambda row: (row["layer"], row["head"])).items():
            cells[layers.index(layer), heads.index(head)] = np.mean([row["error"] for row in own])
    down, across = ([f"{number:.0f}" for number in numbers] for numbers in (layers, heads))
    return maps_of(values, down, across, ("head", "layer"), ERRORS)


def _memory(report: ReportFile) -> Any:
    """A panel per row and side: the planned and the measured peak of every phase."""
    parts = [
        (row, where)
        for row in report.good
        for where in ("host", "device")
        if any(row["planned"][phase][where] for phase in PHASES)
    ]
    if not parts:
        return None
    figure, every = panels(len(parts), 7.6 if len(parts) == 1 else 5, 3.2)
    every[0].set_yticks(range(len(PHASES)), PHASES)
    every[0].invert_yaxis()
    for axes, (row, where) in zip(every, parts, strict=True):
        for i, side in enumerate(("planned", "measured")):
            gib = [row[side][phase][where] / 2**30 for phase in PHASES]
            axes.barh([y + 0.38 * i - 0.19 for y in range(len(PHASES))], gib, 0.36, label=side)
        axes.grid(visible=False, axis="y")
        axes.set(title=f"{row['index']}, {row['context']}, {where}", xlabel="peak (GiB)")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _long(report: ReportFile) -> Any:
    line = [(row["new_tokens"], row["tokens_per_s"]) for row in report.rows]
    figure = figure_of(7.6, 3.2)
    axes = figure.add_subplot(xlabel="tokens of the answer", ylabel="tokens per second")
    method = str(report.config.get("index", "answer"))
    axes.plot(*zip(*line, strict=True), **styles([method])[method])
    axes.set(xlim=(0, None), ylim=(0, 1.1 * max(speed for _, speed in line) or 1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _of_rows(draw: Callable[[list[Row]], Any]) -> Callable[[ReportFile], Any]:
    return lambda report: draw(report.good)


_MEANS = "Means are over the answers there are; the table says where some are missing."
_PICTURES: dict[str, tuple[Callable[[ReportFile], Any], str]] = {
    "latency": (
        lambda report: latency(report.good, str(report.config.get("mode"))),
        "Time against context, a line per method: the median, shaded from p20 to p80. Lower is better.",
    ),
    "recall": (
        _recall,
        "Recall against time, a line per method and a point per effort. Up and to the left is better; the line across "
        f"is at recall {RECALL}.",
    ),
    "compare": (
        _of_rows(pareto),
        "Score against time. Up and to the left is better; the thin line joins methods that none beats in both. "
        + _MEANS,
    ),
    "needle": (_of_rows(grid), f"Score by length and by depth of the needle. {_MEANS}"),
    "ruler": (_of_rows(tasks), f"Score by task. {_MEANS}"),
    "scbench": (_of_rows(tasks), f"Score by task and turn. {_MEANS}"),
    "ppl": (
        _of_rows(partial(lines_of, key="ppl", ylabel="perplexity (per token)")),
        "Perplexity against context, a line per method. Lower is better.",
    ),
    "fidelity": (
        _fidelity,
        "Error of each head's output, by layer. Lower is better; heads without a number are empty.",
    ),
    "memory": (
        _memory,
        "Peak of memory in every phase, planned and measured, of the whole process with its libraries.",
    ),
    "long": (_long, "Speed along the answer; each point is the mean since the last. Higher is better."),
    "kernels": (
        _kernels,
        "Speed beside PyTorch's sdpa on the same chunks, which is 1: higher is better. Error of the output: lower is.",
    ),
}
