"""Runs of `bench fidelity`: the model, with its own weights or random ones, and what is done at each context."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from retrieval_attn.bench.fidelity.format import FIELDS, MEASURES
from retrieval_attn.bench.fidelity.heads import find_planted, hold_out, layers_and_heads, measure_cache
from retrieval_attn.bench.fidelity.held_out import Held
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.names import OURS
from retrieval_attn.bench.methods.talk import Read
from retrieval_attn.bench.ppl.measure import run, scanned_note
from retrieval_attn.bench.ppl.reading import require_room, text_ids
from retrieval_attn.bench.quality.measure import Output, load_llm, parse_methods, read_haystack
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.shared.report import Report, Row
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf.attention import NAME, register
from retrieval_attn.hf.checkpoint import find_checkpoint, load_tokenizer, read_config
from retrieval_attn.llm import EMBEDDED, LLM


def measure(settings: Settings, output: Output) -> Report:
    """The report of one text. Raises ValueError for a method that finds nothing, and for too long a context."""
    _require_finders(parse_methods(settings))
    text = read_haystack(settings.text)
    load = _load_random if settings.options["random"] else load_llm
    report = run(settings, output, partial(_begin, settings, text), load)
    report["notes"] += [MEASURES_NOTE, scanned_note(settings.config)]
    return report


MEASURES_NOTE = (
    "means over queries; error: relative L2, to exact float32 attention over the same keys; mass: true share of what "
    "was read; recall: of the best keys that a search could find; planted: found, of keys put there to be the best"
)


def _require_finders(methods: Sequence[Method]) -> None:
    for method in methods:
        if method.name not in (*OURS, "streaming"):
            raise ValueError(
                f"method {method.label!r} has nothing to find; bench fidelity takes {', '.join((*OURS, 'streaming'))}"
            )
        if not method.shares_prefill:
            raise ValueError(
                f"method {method.label!r}: all methods go on from one exact prefill; leave out weights and prefill"
            )


def _begin(settings: Settings, text: str | None, bench: Bench, methods: object) -> tuple[list[int], "Fidelity"]:
    longest, more = max(settings.contexts), settings.options["queries"]
    ids = text_ids(bench.llm, text, longest + more, settings.seed)
    require_room(longest, more, len(ids), bench.llm)
    return ids, Fidelity(bench, ids, more, settings.options["planted"], settings.seed)


def _load_random(settings: Settings) -> LLM:
    """The model of a config.json, its weights drawn from the seed; with its tokenizer, if there is one."""

    logging.set_verbosity_error()
    checkpoint = find_checkpoint(settings.model or EMBEDDED)
    config = read_config(checkpoint)
    register()
    torch.manual_seed(settings.seed)
    given = {} if settings.dtype == "auto" else {"dtype": getattr(torch, settings.dtype)}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, **given).eval().to(settings.device)
    try:
        tokenizer = load_tokenizer(checkpoint, config)
    except (OSError, ValueError):
        tokenizer = None
    # Where there are no files of one, transformers may make one without any words.
    if tokenizer is not None and tokenizer("one")["input_ids"] == tokenizer("two")["input_ids"]:
        tokenizer = None
    return LLM(model, tokenizer, RetrievalConfig(seed=settings.seed, threads=settings.config.threads))


class Fidelity:
    """The task of `bench fidelity`, see `ppl.reading.Task`. n_queries: tokens after each context whose queries ask;
    n_planted: keys planted for each head, 0 for none."""

    def __init__(self, bench: Bench, ids: list[int], n_queries: int, n_planted: int, seed: int) -> None:
        self._bench, self._ids = bench, ids
        self._n_queries, self._n_planted, self._seed = n_queries, n_planted, seed
        self._read: Read | None = None
        self._held: list[Held] = []

    def begin(self, read: Read) -> None:
        """Let the model read on, exactly, in a fork; the queries of those tokens taught nothing."""
        asking = self._ids[len(read.ids) :][: self._n_queries]
        self._read, self._held = read, hold_out(self._bench.llm.model, read.cache, asking)

    def rows(self, method: Method) -> list[Row]:
        """A row per layer and head."""
        assert self._read is not None
        found = measure_cache(self._read.cache.fork(method.config), method, self._held)
        planted = find_planted(self._read.cache.fork(method.config), method, self._held, self._n_planted, self._seed)
        numbers = [dict(zip(MEASURES, (*one, share), strict=True)) for one, share in zip(found, planted, strict=True)]
        blank = self.blank(len(self._read.ids), method.label)
        return [{**row, **own, "status": "ok"} for row, own in zip(blank, numbers, strict=True)]

    def blank(self, context: int, method: str) -> list[Row]:
        """A row per layer and head."""
        row = {**dict.fromkeys(FIELDS), "context": context, "method": method, "status": "failed", "reason": ""}
        return [{**row, "layer": layer, "head": head} for layer, head in layers_and_heads(self._bench.llm)]
