"""`retrieval-attn bench fidelity`: attention outputs, head by head, beside exact attention; for any model and text."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_attn.bench.ppl.command import as_text, run, title
from retrieval_attn.bench.quality.options import ONE_TEXT, Asked, ExactConfig, KeptReport, Settings, make_settings
from retrieval_attn.bench.quality.runner import Output, exit_status, load_llm, parse_methods, read_haystack
from retrieval_attn.bench.shared.options import WholeModel, at_least
from retrieval_attn.bench.shared.report import Report, Row, short, table
from retrieval_attn.terminal.options import Fields, option, with_options

if TYPE_CHECKING:
    from retrieval_attn.bench.fidelity.held_out import Held
    from retrieval_attn.bench.methods.bench import Bench
    from retrieval_attn.bench.methods.named import Method
    from retrieval_attn.bench.methods.talk import Read
    from retrieval_attn.llm import LLM

MEASURES = ("error", "mass", "recall", "planted")
FIELDS = ("context", "method", "layer", "head", *MEASURES, "status", "reason")

# The runtime keeps so many queries of the newest tokens.
MOST_QUERIES = 256


@with_options
def command(
    asked: Annotated[Asked, Fields(*ONE_TEXT, method="exact,graph,scan,page,streaming")],
    model: WholeModel,
    config: ExactConfig,
    to: KeptReport,
    queries: Annotated[int, option("Tokens after each context whose queries ask, up to 256.", "--queries")] = 64,
    planted: Annotated[int, option("Keys planted for each query head; 0: none.", "--planted")] = 32,
    random: Annotated[bool, option("Random weights, for a folder that has only a config.json.", "--random")] = False,
) -> None:
    """How near each head's attention comes to exact attention: no answers are needed, nor a trained model.

    Held-out queries over a text that was read once, exactly: error of the output, mass of what was read, recall of the
    best keys, and how many planted keys are found. Methods are ours, and streaming, which is the window alone.
    """
    own = {"queries": at_least(queries, 1, "--queries"), "planted": at_least(planted, 0, "--planted"), "random": random}
    settings = make_settings("fidelity", asked, model, config, **own)
    if queries > MOST_QUERIES:
        raise ValueError(f"--queries must be at most {MOST_QUERIES}, got {queries}")
    output = Output(to, settings.as_dict())
    report = measure(settings, output)
    output.write(report, plot_heads, render)
    raise typer.Exit(exit_status(report["results"]))


def measure(settings: Settings, output: Output) -> Report:
    """The report of one text. Raises ValueError for a method that finds nothing, and for too long a context."""
    _require_finders(parse_methods(settings))
    text = read_haystack(settings.text)
    load = _load_random if settings.options["random"] else load_llm
    report = run(settings, output, partial(_begin, settings, text), load)
    report["notes"] += NOTES
    return report


NOTES = [
    "means over queries; error: relative L2, to exact float32 attention over the same keys; mass: true share of what "
    "was read; recall: of the best keys that a search could find; planted: found, of keys put there to be the best",
    "far contexts shorter than exact_below (2048) are scanned exactly, whatever the index",
]


def _require_finders(methods: Sequence["Method"]) -> None:
    from retrieval_attn.bench.methods.named import OURS

    for method in methods:
        if method.name not in (*OURS, "streaming"):
            raise ValueError(
                f"method {method.label!r} has nothing to find; bench fidelity takes {', '.join((*OURS, 'streaming'))}"
            )
        if not method.shares_prefill:
            raise ValueError(
                f"method {method.label!r}: all methods go on from one exact prefill; leave out weights and prefill"
            )


def _begin(settings: Settings, text: str | None, bench: "Bench", methods: object) -> "tuple[list[int], Fidelity]":
    from retrieval_attn.bench.ppl.measure import require_room, text_ids

    longest, more = max(settings.contexts), settings.options["queries"]
    ids = text_ids(bench.llm, text, longest + more, settings.seed)
    require_room(longest, more, len(ids), bench.llm)
    return ids, Fidelity(bench, ids, more, settings.options["planted"], settings.seed)


def _load_random(settings: Settings) -> "LLM":
    """The model of a config.json, its weights drawn from the seed; with its tokenizer, if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from retrieval_attn.config import RetrievalConfig
    from retrieval_attn.hf.attention import NAME, register
    from retrieval_attn.llm import EMBEDDED, LLM, require_causal_lm

    logging.set_verbosity_error()
    source = str(Path(settings.model or EMBEDDED).expanduser())
    config = require_causal_lm(source)
    register()
    torch.manual_seed(settings.seed)
    given = {} if settings.dtype == "auto" else {"dtype": getattr(torch, settings.dtype)}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, **given).eval().to(settings.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
    # Where there are no files of one, transformers may make one without any words.
    if tokenizer is not None and tokenizer("one")["input_ids"] == tokenizer("two")["input_ids"]:
        tokenizer = None
    return LLM(model, tokenizer, RetrievalConfig(seed=settings.seed, threads=settings.config.threads))


class Fidelity:
    """The task of `bench fidelity`, see `ppl_measure.Task`. n_queries: tokens after each context whose queries ask;
    n_planted: keys planted for each head, 0 for none."""

    def __init__(self, bench: "Bench", ids: list[int], n_queries: int, n_planted: int, seed: int) -> None:
        self._bench, self._ids = bench, ids
        self._n_queries, self._n_planted, self._seed = n_queries, n_planted, seed
        self._read: Read | None = None
        self._held: list[Held] = []

    def begin(self, read: "Read") -> None:
        """Let the model read on, exactly, in a fork; the queries of those tokens taught nothing."""
        from retrieval_attn.bench.fidelity.measure import hold_out

        asking = self._ids[len(read.ids) :][: self._n_queries]
        self._read, self._held = read, hold_out(self._bench.llm.model, read.cache, asking)

    def rows(self, method: "Method") -> list[Row]:
        """A row per layer and head."""
        from retrieval_attn.bench.fidelity.measure import find_planted, measure_cache

        assert self._read is not None
        found = measure_cache(self._read.cache.fork(method.config), method, self._held)
        planted = find_planted(self._read.cache.fork(method.config), method, self._held, self._n_planted, self._seed)
        numbers = [dict(zip(MEASURES, (*one, share), strict=True)) for one, share in zip(found, planted, strict=True)]
        blank = self.blank(len(self._read.ids), method.label)
        return [{**row, **own, "status": "ok"} for row, own in zip(blank, numbers, strict=True)]

    def blank(self, context: int, method: str) -> list[Row]:
        """A row per layer and head."""
        from retrieval_attn.bench.fidelity.measure import layers_and_heads

        row = {**dict.fromkeys(FIELDS), "context": context, "method": method, "status": "failed", "reason": ""}
        return [{**row, "layer": layer, "head": head} for layer, head in layers_and_heads(self._bench.llm)]


_COLUMNS = [
    ("context", "context", "{}"),
    ("method", "method", "{}"),
    ("heads", "heads", "{}"),
    *((f"{name}, {kind}", f"{kind}_{name}", "{:.4f}") for name in MEASURES for kind in ("mean", "worst")),
    ("status", "status", "{}"),
]


def render(report: Report, form: str, scores_only: bool = False) -> str:
    """The report as text, see `quality_format.render`; Markdown says nothing of single heads."""
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
