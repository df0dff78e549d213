"""Whole models: a generated text is read, then tokens are generated, by each method in turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import retrieval_attn
from retrieval_attn.bench.latency.format import blank_row
from retrieval_attn.bench.latency.options import Options
from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.shared.facts import prose
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.machine import PeakMemory, require_memory, synchronize
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.generate import Request
from retrieval_attn.hf.checkpoint import find_checkpoint, read_config
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.hf.weights import load_weights, weight_options
from retrieval_attn.llm import EMBEDDED, LLM

CHECKED_STEPS = 4

# Largest relative L2 distance between the logits of `folded` and `full`, which compute the same function.
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-3}

# Longest prompt of the warm-up, which compiles and touches everything once.
_WARMUP_TOKENS = 4096


class Run:
    """What one generation cost, in seconds; logits (n, V) of the first steps and the tokens that were fed for them."""

    def __init__(self) -> None:
        self.ttft = self.prefill = self.build = 0.0
        self.itl: list[float] = []
        self.parts: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.logits: Tensor | None = None
        self.fed: list[int] = []


class Retrieving:
    """The model through `retrieval_attn.load`."""

    def __init__(self, kind: str, options: Options, llm: LLM) -> None:
        self._config = replace(options.config, index=kind)
        self._llm, self._options = llm, options

    def run(self, ids: list[int], fed: list[int]) -> Run:
        """Generate; then, if `fed` is given, go back and note the logits for those tokens instead."""
        cache = retrieval_attn.RetrievalCache(self._llm.model.config, self._config)
        # No stop tokens: every run makes as many tokens as the others.
        request = Request(self._llm.model, cache, Sampling(max_new_tokens=self._options.gen + 1), ())
        for _ in request.tokens(ids):
            pass
        run, stats = Run(), request.stats
        run.ttft, run.prefill, run.build, run.itl = stats.ttft_s, stats.prefill_s, stats.build_s, stats.itl_s
        run.parts = {part: getattr(stats, f"{part}_s") / len(run.itl) for part in ("near", "search", "gather", "merge")}
        run.facts = {
            "visited_pct": 100 * stats.visited_fraction,
            "index_bytes": stats.index_bytes,
            "kv_bytes": stats.host_kv_bytes + stats.device_kv_bytes,
        }
        if fed:
            cache.crop(len(ids) - cache.get_seq_length())
            run.logits = _feed(self._llm.model, cache, fed)
        return run


class Rival:
    """The same weights in stock transformers, with sdpa and a DynamicCache; prefill in the same chunks."""

    def __init__(self, implementation: str, options: Options, model: Any) -> None:
        self._implementation, self._options, self._model = implementation, options, model

    def run(self, ids: list[int], fed: list[int]) -> Run:
        """As `Retrieving.run`; without `fed`, the logits are those of its own tokens."""
        self._model.set_attn_implementation(self._implementation)
        cache, run, device = DynamicCache(config=self._model.config), Run(), self._options.device
        synchronize(device)
        started = time.perf_counter()
        chunk = RetrievalConfig().prefill_chunk
        for start in range(0, len(ids), chunk):
            out = self._forward(ids[start : start + chunk], cache)
        token = int(out.argmax(-1))
        run.ttft = run.prefill = time.perf_counter() - started
        logits = []
        for _ in range(self._options.gen):
            started = time.perf_counter()
            run.fed.append(token)
            out = self._forward([token], cache)
            token = int(out.argmax(-1))
            run.itl.append(time.perf_counter() - started)
            logits.append(out)
        run.facts = {"kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
        run.fed = run.fed[:CHECKED_STEPS]
        run.logits = torch.cat(logits[:CHECKED_STEPS])
        if fed and fed != run.fed:
            for layer in cache.layers:
                layer.crop(-(self._options.gen))
            run.logits = _feed(self._model, cache, fed)
        return run

    def _forward(self, ids: list[int], cache: DynamicCache) -> Tensor:
        tokens = torch.tensor([ids], device=self._model.device)
        return (
            self._model(input_ids=tokens, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .float()
        )


def measure_model(options: Options, advance: Callable[[str], None]) -> Iterator[Row]:
    """Rows of every context, a method each."""
    with ExitStack() as stack:
        if "folded" in options.methods:
            stack.enter_context(rivals.folded_registered())
        advance("loading the model")
        methods, llm = _load(options)
        for context in options.contexts:
            yield from _measure_context(options, context, methods, llm, advance)


def _load(options: Options) -> tuple[dict[str, Any], LLM]:
    llm = retrieval_attn.load(options.model, options.config, device=options.device, dtype=options.dtype)
    stock = None
    methods: dict[str, Any] = {}
    for name in options.methods:
        if name not in rivals.FUNCTIONS:
            methods[name] = Retrieving(name, options, llm)
            continue
        if stock is None:
            checkpoint, device = find_checkpoint(options.model or EMBEDDED), torch.device(options.device)
            read_as = weight_options(checkpoint, "auto", options.dtype, device)
            stock = load_weights(checkpoint, read_config(checkpoint), read_as, device, "sdpa")
        methods[name] = Rival({"full": "sdpa", "folded": rivals.FOLDED}[name], options, stock)
    return methods, llm


def _measure_context(
    options: Options, context: int, methods: dict[str, Any], llm: LLM, advance: Callable[[str], None]
) -> Iterator[Row]:
    rows = {name: blank_row(context, name) for name in methods}
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    peaks = {name: PeakMemory(options.device) for name in methods}
    for turn in range(-min(1, options.warmup), options.repeat):
        for name, method in methods.items():
            if rows[name]["reason"]:
                continue
            advance(f"{context} tokens: {name}")
            fed = runs["full"][0].fed if options.check and turn == 0 and runs.get("full") else []
            try:
                ids = prompt(llm, context, options)
                require_memory(2 * llm.plan(context + options.gen).host, f"{context} tokens of this model")
                with torch.no_grad(), peaks[name]:
                    run = method.run(ids if turn >= 0 else ids[:_WARMUP_TOKENS], fed)
                if turn >= 0:
                    runs[name].append(run)
            except FAILURES as error:
                fail(rows[name], error)
    for name, row in rows.items():
        if runs[name] and not row["reason"]:
            _summarise(row, runs[name], peaks[name])
            if options.check:
                _check(row, runs[name][0], runs["full"][0] if runs.get("full") else None, options)
    yield from rows.values()


def prompt(llm: LLM, n_tokens: int, options: Options) -> list[int]:
    """Exactly n_tokens token ids of generated prose; ValueError if the model cannot take them and an answer."""
    if n_tokens + options.gen >= llm.max_tokens:
        raise ValueError(f"{n_tokens} tokens and {options.gen} more are longer than the model's {llm.max_tokens}")
    n_chars = 6 * n_tokens
    while len(ids := llm.encode_text(prose(n_chars, options.config.seed))) < n_tokens:
        n_chars *= 2
    return llm.encode(ids[:n_tokens])


def _feed(model: Any, cache: Any, tokens: list[int]) -> Tensor:
    """Logits (n, V) after each of `tokens`, fed one by one."""
    rows = []
    for token in tokens:
        ids = torch.tensor([[token]], device=model.device)
        rows.append(
            model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits[:, -1].float()
        )
    return torch.cat(rows)


def _summarise(row: Row, runs: list[Run], peak: PeakMemory) -> None:
    itl = [1e3 * seconds for run in runs for seconds in run.itl]
    row["samples"] = {
        "itl_ms": [[1e3 * seconds for seconds in run.itl] for run in runs],
        "ttft_ms": [1e3 * run.ttft for run in runs],
        "prefill_ms": [1e3 * run.prefill for run in runs],
        "build_s": [run.build for run in runs],
    }
    row["total_ms"], row["tpot_ms"] = float(np.median(itl)), float(np.mean(itl))
    row["total_p20_ms"], row["total_p80_ms"] = np.percentile(itl, [20, 80]).tolist()
    row["itl_p50_ms"], row["itl_p90_ms"], row["itl_p99_ms"] = np.percentile(itl, [50, 90, 99]).tolist()
    row["ttft_ms"] = float(np.median(row["samples"]["ttft_ms"]))
    row["prefill_ms"] = float(np.median(row["samples"]["prefill_ms"]))
    row["steps"] = len(itl)
    if runs[0].parts:
        row["build_s"] = float(np.median(row["samples"]["build_s"]))
        for part in runs[0].parts:
            row[f"{part}_ms"] = 1e3 * float(np.median([run.parts[part] for run in runs]))
        row["rest_ms"] = row["tpot_ms"] - sum(row[f"{part}_ms"] for part in runs[0].parts)
    row.update(runs[-1].facts)
    row["peak_rss_bytes"], row["peak_device_bytes"] = peak.rss, peak.device or None
    row["status"] = "ok"


def _check(row: Row, run: Run, full: Run | None, options: Options) -> None:
    """Logits against those of `full` for the same tokens. Only a method that computes the same can fail by them."""
    if full is None or full.logits is None or run.logits is None:
        row["check"] = "no rival"
        return
    row["rel_error"] = float((run.logits - full.logits).norm() / full.logits.norm())
    same = row["method"] in rivals.FUNCTIONS
    allowed = TOLERANCE[options.dtype]
    finite = bool(torch.isfinite(run.logits).all())
    if finite and not same and row["rel_error"] > allowed:
        # Retrieval attends to fewer keys on purpose: its error is reported, and there is nothing it should pass.
        row["check"] = "not compared"
        return
    row["check"] = "passed" if finite and row["rel_error"] <= allowed else "failed"
    if row["check"] == "failed":
        row["status"] = "failed"
        row["reason"] = (
            f"logits are {row['rel_error']:.1e} (relative L2) from those of full, at most {allowed:.0e} allowed"
        )
