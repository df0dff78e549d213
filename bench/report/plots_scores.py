"""Pictures of scores by task, by turn and against time, and of memory: planned beside measured."""

from typing import Any

from retrieval_attn.bench.memory.command import PHASES
from retrieval_attn.bench.quality.scores import Line, costs, grouped, methods, score_lines
from retrieval_attn.bench.report.read import Report
from retrieval_attn.bench.report.svg import SERIES, Plot, draw, legend, log_axis, panel_size, panels, styles
from retrieval_attn.bench.shared.report import Row, short

_NOTE = "Means are over the answers there are; the table says where some are missing."


def by_task(report: Report) -> Plot:
    """A panel per context: a row per task, a mark per method."""
    lines = score_lines(report.rows, by_turn=False)
    tasks = list(dict.fromkeys(line.task for line in lines))
    parts = grouped(lines, lambda line: line.context)
    looks = styles(methods(lines))
    n_columns = min(3, len(parts))

    def paint(figure: Any) -> None:
        for axes, context in zip(panels(figure, len(parts), n_columns, sharey=True), sorted(parts), strict=True):
            _task_panel(axes, parts[context], tasks, looks)
            axes.set_title(f"{short(context)} tokens")
        legend(figure, looks, lines=False)

    size = panel_size(
        len(parts), n_columns, 3.6 if n_columns > 1 else 7.6, (0.16 + 0.08 * len(looks)) * len(tasks) + 1.2
    )
    alt = "Dot charts: mean score by task, a mark per method, a panel per context."
    return Plot(draw(paint, size, report.name, alt), _NOTE)


def _task_panel(axes: Any, lines: list[Line], tasks: list[str], looks: dict[str, dict[str, Any]]) -> None:
    for i, (method, look) in enumerate(looks.items()):
        # Marks of equal scores stand below each other, in the order of the key.
        shift = 0.7 * ((i + 0.5) / len(looks) - 0.5)
        points = [
            (100 * score.mean, tasks.index(line.task) + shift)
            for line in lines
            if (score := line.scores.get(method)) and score.mean is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], **{**look, "ls": ""}, clip_on=False)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (per cent)")
    axes.tick_params(axis="y", length=0)


def by_turn(report: Report) -> Plot:
    """A panel per task, context and mode: a line per method along the turns."""
    lines = score_lines(report.rows, by_turn=True)
    parts = grouped(lines, lambda line: line[:3])
    looks = styles(methods(lines))
    n_columns = min(3, len(parts))

    def paint(figure: Any) -> None:
        every = panels(figure, len(parts), n_columns, "score (per cent)", sharey=True)
        for axes, ((task, context, mode), part) in zip(every, parts.items(), strict=True):
            _turn_panel(axes, part, looks)
            axes.set_title(", ".join(filter(None, (task, short(context), mode))))
        legend(figure, looks)

    size = panel_size(len(parts), n_columns, 3.5 if n_columns > 1 else 7.6, 2.6)
    alt = "Line charts: mean score by turn, a line per method, a panel per task, context and mode."
    return Plot(draw(paint, size, report.name, alt), _NOTE)


def _turn_panel(axes: Any, lines: list[Line], looks: dict[str, dict[str, Any]]) -> None:
    for method, look in looks.items():
        points = [
            (line.turn or 0, 100 * score.mean)
            for line in lines
            if (score := line.scores.get(method)) and score.mean is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], **look, clip_on=False)
    turns = sorted({line.turn or 0 for line in lines})
    axes.set_xticks(turns, [f"{turn:.0f}" for turn in turns])
    axes.set_xlim(turns[0] - 0.3, turns[-1] + 0.3)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("turn")


def frontier(report: Report) -> Plot | None:
    """A panel per context: score against milliseconds per token, and the line of methods that none beats in both."""
    points = _points(report)
    parts = grouped(points, lambda point: point["context"])
    looks = styles(point["method"] for point in points)
    if not points:
        return None
    n_columns = min(3, len(parts))

    def paint(figure: Any) -> None:
        every = panels(figure, len(parts), n_columns, "score (per cent)", sharey=True)
        for axes, context in zip(every, sorted(parts), strict=True):
            _frontier_panel(axes, parts[context], looks)
            axes.set_title(f"{short(context)} tokens")
        legend(figure, looks, lines=False)

    size = panel_size(len(parts), n_columns, 3.6 if n_columns > 1 else 7.6, 3.4)
    alt = "Scatter charts: mean score against milliseconds per token, a mark per method, a panel per context."
    caption = "Up and to the left is better; the thin line joins the methods that no other beats in both. "
    return Plot(draw(paint, size, report.name, alt), caption + _NOTE)


def _points(report: Report) -> list[Row]:
    """Score in per cent over all tasks and median time per token, by context and method that have both."""
    times = {(row["context"], row["method"]): row["tpot_ms"] for row in costs([{**r, "mode": ""} for r in report.rows])}
    lines = score_lines([{**row, "task": ""} for row in report.rows], by_turn=False)
    return [
        {"context": line.context, "method": method, "score": 100 * score.mean, "ms": times[line.context, method]}
        for line in lines
        for method, score in line.scores.items()
        if score.mean is not None and times.get((line.context, method))
    ]


def _frontier_panel(axes: Any, points: list[Row], looks: dict[str, dict[str, Any]]) -> None:
    best: list[Row] = []
    for point in sorted(points, key=lambda point: (point["ms"], -point["score"])):
        if not best or point["score"] > best[-1]["score"]:
            best.append(point)
    axes.plot([p["ms"] for p in best], [p["score"] for p in best], color=axes.xaxis.label.get_color(), lw=0.6)
    for point in points:
        axes.plot(point["ms"], point["score"], **{**looks[point["method"]], "ls": "", "ms": 8}, clip_on=False)
    axes.set_xscale("log")
    log_axis(axes.xaxis)
    axes.set_xlim(min(p["ms"] for p in points) / 1.5, max(p["ms"] for p in points) * 1.5)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("milliseconds per token (median)")


def peaks(report: Report) -> Plot | None:
    """A panel per row and side: the planned and the measured peak of every phase."""
    parts = [
        (f"{row['index']}, {row['context']}, {where}", row, where)
        for row in report.good
        for where in ("host", "device")
        if any(row["planned"][phase][where] for phase in PHASES)
    ]
    if not parts:
        return None
    n_columns = min(2, len(parts))
    looks = {side: {"color": SERIES[i], "marker": "s"} for i, side in enumerate(("planned", "measured"))}

    def paint(figure: Any) -> None:
        for axes, (title, row, where) in zip(panels(figure, len(parts), n_columns), parts, strict=True):
            for i, (side, look) in enumerate(looks.items()):
                gib = [row[side][phase][where] / 2**30 for phase in PHASES]
                at = [y + 0.38 * i - 0.19 for y in range(len(PHASES))]
                axes.barh(at, gib, 0.36, color=look["color"])
            axes.set_yticks(range(len(PHASES)), PHASES)
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.set(title=title, xlabel="peak (GiB)")
        legend(figure, looks, lines=False)

    size = panel_size(len(parts), n_columns, 5 if n_columns > 1 else 7.6, 3.2)
    alt = "Bar charts: planned and measured peak of memory in every phase, a panel per context and index."
    return Plot(draw(paint, size, report.name, alt), "Of the whole process, libraries included.")
