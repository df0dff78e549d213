"""The measured tables of a README: the text between two marks, written from the reports.

<!-- bench report: NAME -->
what stands here is generated
<!-- end -->
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from retrieval_attn.bench.latency.options import RIVALS
from retrieval_attn.bench.quality.scores import Line, ends, methods, score_lines
from retrieval_attn.bench.recall.curves import CURVE, at_recall, curves
from retrieval_attn.bench.recall.format import RECALL
from retrieval_attn.bench.report.read import ANSWERS, Found, ReportFile
from retrieval_attn.bench.shared.report import Row, short, table

LATENCY_FILE = "latency-llama3-8b-layer-2core.json"
RECALL_FILE = "recall-shaped-128k-2core.json"

_BEGIN, _END = re.compile(r"<!-- bench report: (.*?) -->"), "<!-- end -->"

# Text set to the right, as numbers are.
_RIGHT = "{:>}"

_LATENCY_HEADS = {
    "full": "`full`: stock sdpa",
    "folded": "`folded`: group in the query axis",
    "exact": "`exact`",
    "graph": "`graph`",
    "scan": "`scan`",
}

# What a method is called, and what its share of visited keys leaves unsaid.
_SEARCH_NAMES = {"faiss-ivf": "faiss IVF", "hnsw": "faiss HNSW"}
_VISITED = {"scan": ", as 4-bit codes", "graph": ", after comparing int8 means of pairs of a quarter of the keys"}


def rewritten(text: str, found: Found, folder: Path) -> str:
    """The README with its blocks written anew, and nothing else changed. folder: where it lies, for its links.

    Raises ValueError for a block without end or with an unknown name, for a text without any, and for a report that a
    block needs and that is not there.
    """
    parts, at = [], 0
    while begin := _BEGIN.search(text, at):
        end = text.find(_END, begin.end())
        following = _BEGIN.search(text, begin.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f"block {begin[1]!r} of the README must end with {_END}")
        parts += [text[at : begin.end()], "\n", _block(begin[1], found, folder), "\n"]
        at = end
    if not parts:
        raise ValueError(f"the README has no block; write <!-- bench report: NAME --> and {_END}, NAME {_names()}")
    return "".join([*parts, text[at:]])


def _names() -> str:
    return f"one of {', '.join(BLOCKS)}"


def _block(name: str, found: Found, folder: Path) -> str:
    if name not in BLOCKS:
        raise ValueError(f"a block of the README must be {_names()}, got {name!r}")
    return BLOCKS[name](found, folder)


def latency(found: Found, folder: Path) -> str:
    """Milliseconds of a step by context and method; relative error in brackets where keys are retrieved."""
    report = _the(found, LATENCY_FILE, "latency")
    lines: dict[int, Row] = {}
    for row in report.rows:
        line = lines.setdefault(row["context"], {"context": short(row["context"]).upper()})
        line[row["method"]] = _step(row)
    columns = [("context", "context", _RIGHT), *((head, name, _RIGHT) for name, head in _LATENCY_HEADS.items())]
    blank = dict.fromkeys(_LATENCY_HEADS, "-")
    return table(columns, [{**blank, **lines[n]} for n in sorted(lines)]) + "\n\n" + _sources([report], folder)


def _step(row: Row) -> str:
    if row["status"] != "ok":
        return _plain(row["status"])
    error = "" if row["method"] in RIVALS or row["rel_error"] is None else f" ({100 * row['rel_error']:.1f} %)"
    return _rounded(row["total_ms"], 100) + error


def recall(found: Found, folder: Path) -> str:
    """Time, visited keys, build and size of each index at the same recall, fastest first."""
    report = _the(found, RECALL_FILE, "recall")
    reached = at_recall(report.rows, RECALL)
    if len({tuple(row[name] for name in CURVE[:3]) for row in reached}) > 1:
        raise ValueError(f"block 'recall' needs one source, context and seed in {RECALL_FILE}")
    reached.sort(key=lambda row: (row["search_us"] is None, row["search_us"] or 0))
    efforts = {name[-1]: line for name, line in curves(report.rows).items()}
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(report.config.get("dtype")), "model's")
    columns = [
        ("", "name", "{}"),
        ("milliseconds", "ms", _RIGHT),
        ("keys visited", "visited", _RIGHT),
        ("build, s", "build", _RIGHT),
        (f"index, share of the {dtype} KV", "share", _RIGHT),
    ]
    lines = [_searched(row, efforts[row["method"]]) for row in reached]
    return table(columns, lines) + "\n\n" + _sources([report], folder)


def _searched(found: Row, curve: Sequence[Row]) -> Row:
    """A line of the table of searches. curve: the method's rows, least effort first. One whose least effort is better
    already is named with its recall."""
    method = found["method"]
    name = _SEARCH_NAMES.get(method, f"`{_plain(method)}`")
    if found["search_us"] is None:
        best = max(row["recall"] for row in curve)
        return {"name": f"{name} (recall {best:.2g} at most)", "ms": "-", "visited": "-", **_index(curve[0])}
    if found["bound"]:
        name += f" (recall {curve[0]['recall']:.2g})"
    visited = f"{_rounded(found['visited_pct'], 10)} %{_VISITED.get(method, '')}"
    return {"name": name, "ms": _rounded(found["search_us"] / 1e3, 100), "visited": visited, **_index(curve[0])}


def _index(row: Row) -> Row:
    """Seconds of the build and share of keys and values; nothing to say of a method that keeps no index."""
    if not row["index_bytes"] or row["build_s"] is None or row["index_pct"] is None:
        return {"build": "-", "share": "-"}
    return {"build": _rounded(row["build_s"], 10), "share": f"{_rounded(row['index_pct'], 100)} %"}


def quality(found: Found, folder: Path) -> str:
    """Mean scores in per cent, a line per report, task and context; of SCBench by mode, at the first and last turn.

    Tasks at which no method is ever right are only named.
    """
    reports = [report for report in found.of(*SCORED) if report.rows]
    if not reports:
        return f"No report of {', '.join(SCORED)} yet."
    every = [(report, line) for report in reports for line in _asked(report)]
    able = {(report.name, line.task) for report, line in every if any(one.mean for one in line.scores.values())}
    lines = [(report, line) for report, line in every if (report.name, line.task) in able]
    beyond = dict.fromkeys(
        f"{_plain(line.task)} ({report.kind})" for report, line in every if (report.name, line.task) not in able
    )
    names = methods(line for _, line in lines)
    columns = [
        ("", "report", "{}"),
        ("task", "task", "{}"),
        ("context", "context", _RIGHT),
        ("mode and turn", "turn", "{}"),
        ("answers", "answers", _RIGHT),
        *((f"`{_plain(name)}`", f"score of {name}", _RIGHT) for name in names),
    ]
    rows = [_line(report, line, names, folder) for report, line in lines]
    said = "Mean scores in per cent, over the answers there are.\n\n"
    failed = f"\n\nNo answer is right, whatever the method, in {', '.join(beyond)}." if beyond else ""
    return said + table(columns, rows) + failed + "\n\n" + _sources(reports, folder)


def _line(report: ReportFile, line: Line, names: Iterable[str], folder: Path) -> Row:
    turn = f", turn {line.turn:.0f}" if line.turn is not None else ""
    return {
        "report": _link(report, folder, report.kind),
        "task": _plain(line.task),
        "context": short(line.context).upper(),
        "turn": _plain(line.mode) + turn if line.mode else "",
        "answers": line.answers,
        **{f"score of {name}": _plain(str(line.scores.get(name, "-"))) for name in names},
    }


def _asked(report: ReportFile) -> list[Line]:
    turns = report.kind == "scbench"
    lines = score_lines(report.rows, by_turn=turns)
    return ends(lines) if turns else lines


def perplexity(found: Found, folder: Path) -> str:
    """Perplexity by model, context and method; in brackets the KL from full attention, and how often both agree."""
    reports = [report for report in found.of("ppl") if report.good]
    if not reports:
        return "No report of ppl yet."
    lines: dict[tuple[str, int], Row] = {}
    for report in reports:
        for row in report.good:
            line = lines.setdefault((report.name, row["context"]), {"context": short(row["context"]).upper()})
            line["model"] = _file_name(report.config.get("model"), "embedded")
            line["text"] = _file_name(report.config.get("text"), "prose")
            line[row["method"]] = _foretold(row)
    names = list(dict.fromkeys(row["method"] for report in reports for row in report.good))
    columns = [
        ("model", "model", "{}"),
        ("text", "text", "{}"),
        ("context", "context", _RIGHT),
        *((f"`{_plain(name)}`", name, _RIGHT) for name in names),
    ]
    return (
        table(columns, [dict.fromkeys(names, "-") | line for line in lines.values()])
        + "\n\n"
        + _sources(reports, folder)
    )


def _foretold(row: Row) -> str:
    if row["method"] == "full" or row["kl"] is None:
        return f"{row['ppl']:.2f}"
    return f"{row['ppl']:.2f} ({row['kl']:.2g}, {100 * row['agreement']:.0f} %)"


def _file_name(path: object, otherwise: str) -> str:
    return otherwise if path is None else _plain(Path(str(path)).name)


# A comparison is a table of its own, of costs above all.
SCORED = tuple(kind for kind in ANSWERS if kind != "compare")

BLOCKS: dict[str, Callable[[Found, Path], str]] = {
    "latency": latency,
    "recall": recall,
    "quality": quality,
    "perplexity": perplexity,
}


def _the(found: Found, name: str, block: str) -> ReportFile:
    for report in found.reports:
        if report.name == name:
            return report
    skipped = dict(found.skipped)
    raise ValueError(f"block {block!r} needs {name} in {str(found.folder)!r}: {skipped.get(name, 'not there')}")


def _sources(reports: Iterable[ReportFile], folder: Path) -> str:
    """The last line of a block: its files, each with its commit."""
    named = [f"{_link(report, folder, report.name)} (commit {_plain(report.commit)})" for report in reports]
    return f"From {'; '.join(named)}."


def _link(report: ReportFile, folder: Path, text: str) -> str:
    return f"[{_plain(text)}]({quote(Path(os.path.relpath(report.path, folder)).as_posix())})"


def _plain(text: str) -> str:
    """Text of a report that can end neither a cell nor a block."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _rounded(value: float, whole_from: float) -> str:
    """One decimal below a limit, none above."""
    return f"{value:.1f}" if round(value, 1) < whole_from else f"{value:.0f}"
