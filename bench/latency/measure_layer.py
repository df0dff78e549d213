"""Decode steps of attention layers alone: synthetic vectors are put into the layers' memories, no model is run."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.attention.decode import StepClock, decode
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.bench.latency.format import blank_row
from retrieval_attn.bench.latency.options import RIVALS, Options
from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.shared.exact import exact_attention, relative
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.machine import PeakMemory, cache_bytes, require_memory, synchronize
from retrieval_attn.bench.shared.options import LayerShape
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.bench.vectors.sources import Vectors, shaped
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_choice import bytes_per_key
from retrieval_attn.far.query_sample import RECENT_QUERIES

PARTS = ("near", "search", "gather", "merge", "rest", "total")

# Largest relative L2 distance between a method's output and float32 attention over the very keys it selected, for
# outputs rounded to the dtype: unit roundoff times a small factor for the accumulated softmax.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}

CHECKED_STEPS = 4

Step = dict[str, float]


class Contender(Protocol):
    """One way to compute a decode step."""

    name: str

    def step(self, n: int, query: Tensor, layer: int) -> Step:
        """Seconds of the n-th step of a layer, by part; query (1, H, 1, D)."""

    def check(self, queries: Tensor) -> dict[str, float]:
        """Errors against float32 attention for queries (1, H, n, D) of layer 0."""

    def sizes(self) -> dict[str, Any]:
        """Fields of the row that do not vary."""


class Layer(NamedTuple):
    """A layer filled with `shaped` vectors. fresh_keys, fresh_values (1, G, n, D): of tokens yet to come."""

    memory: LayerMemory
    queries: Tensor
    fresh_keys: Tensor
    fresh_values: Tensor


class Retrieving:
    """Search, gather and merge, over memories that share their tokens with the other methods'."""

    def __init__(self, kind: str, options: Options, layers: list[Layer]) -> None:
        self.name = kind
        config = dataclasses.replace(options.config, index=kind)
        self._device = options.device
        self._layers = layers
        self._memories = [_twin(layer.memory, config) for layer in layers]
        for memory in self._memories:
            memory.index()
        self._build_seconds = sum(memory.far_index.build_seconds for memory in self._memories)

    def step(self, n: int, query: Tensor, layer: int) -> Step:
        memory, source, clock = self._memories[layer], self._layers[layer], StepClock()
        keys, values = source.fresh_keys[:, :, n : n + 1], source.fresh_values[:, :, n : n + 1]
        synchronize(self._device)
        started = time.perf_counter()
        memory.append(query, keys, values)
        decode(query, memory, query.shape[-1] ** -0.5, clock)
        synchronize(self._device)
        total = time.perf_counter() - started
        parts = {"near": clock.near, "search": clock.search, "gather": clock.gather, "merge": clock.merge}
        return {**parts, "rest": total - sum(parts.values()), "total": total, "visited": clock.visited_fraction}

    def check(self, queries: Tensor) -> dict[str, float]:
        memory = self._memories[0]
        keys, values = memory.store.keys(), memory.store.values()
        errors = []
        for i in range(queries.shape[2]):
            query = queries[:, :, i : i + 1].contiguous()
            out = self._output(memory, query)
            exact = exact_attention(query, keys, values)
            chosen, recall = self._selection(query)
            same = exact_attention(query, keys, values, chosen)
            plain = self._output(_twin_of(memory, estimator="topk"), query)
            errors.append((relative(out, exact), relative(plain, same), recall))
        total, computed, recall = np.mean(errors, axis=0)
        return {"rel_error": float(total), "computation": float(computed), "recall": float(recall)}

    @staticmethod
    def _output(memory: LayerMemory, query: Tensor) -> Tensor:
        memory.forget_step()
        return decode(query, memory, query.shape[-1] ** -0.5, StepClock()).out.float().cpu()[0, :, 0]

    def _selection(self, query: Tensor) -> tuple[Tensor, float]:
        """Which tokens (H, S) the step attends to, and how many of the best far ones its search found."""
        memory = self._memories[0]
        split, config, index = memory.split, memory.config, memory.index()
        H, G = query.shape[1], memory.shape.kv_heads
        chosen = torch.ones((H, memory.length), dtype=torch.bool)
        if index is None:
            return chosen, 1.0
        # Of the far keys, the newest are read in any case.
        chosen[:, split.sink_stop : split.sink_stop + index.n_keys] = False
        found = index.search(query[0].float().cpu(), config.top_k, effort=config.effort).ids[:, 0]
        recalls = []
        for h in range(H):
            ids = torch.as_tensor(found[h][found[h] >= 0]).long()
            group = range(h // (H // G) * (H // G), (h // (H // G) + 1) * (H // G)) if config.share_group else [h]
            for other in group:
                chosen[other, split.sink_stop + ids] = True
            scores = memory.far_keys()[h // (H // G), : index.n_keys].float() @ query[0, h, 0].float().cpu()
            best = scores.topk(min(config.top_k, index.n_keys)).indices
            recalls.append(float(torch.isin(best, ids).float().mean()))
        return chosen, sum(recalls) / H

    def sizes(self) -> dict[str, Any]:
        indexes = [memory.far_index.if_built for memory in self._memories]
        return {
            "build_s": self._build_seconds,
            "index_bytes": sum(index.nbytes for index in indexes if index is not None),
            "kv_bytes": sum(memory.store.nbytes for memory in self._memories),
        }

    def bytes_per_step(self, visited: float) -> float:
        """Bytes of keys and values that one step of one layer reads, at most: heads of a group may share reads."""
        memory = self._memories[0]
        (G, D, _, dtype, *_), n_far = memory.shape, memory.split.n_far
        H, top_k = self._layers[0].queries.shape[1], memory.config.top_k
        row = D * dtype.itemsize
        index = memory.far_index.if_built
        # A scan reads its codes, not the keys that it looks at through them.
        coded = index.nbytes if index is not None and index.kind == "scan" else 0
        searched = G * n_far if self.name == "exact" else 0 if coded else H * visited * n_far
        near = 2 * G * (memory.length - n_far)
        return coded + row * (near + searched + 2 * min(H * top_k, G * n_far))


class Rival:
    """Attention over all tokens, contiguous on the device."""

    def __init__(self, name: str, options: Options, tensors: list[tuple[Tensor, Tensor]]) -> None:
        self.name = name
        self._attend: Callable[[Tensor, Tensor, Tensor], Tensor] = rivals.FUNCTIONS[name]
        self._device = options.device
        self._tensors = tensors
        self._n_layers = options.layers

    def step(self, n: int, query: Tensor, layer: int) -> Step:
        keys, values = self._tensors[layer % len(self._tensors)]
        synchronize(self._device)
        started = time.perf_counter()
        self._attend(query, keys, values)
        synchronize(self._device)
        return {"total": time.perf_counter() - started}

    def check(self, queries: Tensor) -> dict[str, float]:
        keys, values = self._tensors[0]
        errors = []
        for i in range(queries.shape[2]):
            query = queries[:, :, i : i + 1].contiguous()
            out = self._attend(query, keys, values).float().cpu()[0, :, 0]
            errors.append(relative(out, exact_attention(query, keys[0].cpu(), values[0].cpu())))
        error = sum(errors) / len(errors)
        return {"rel_error": error, "computation": error}

    def sizes(self) -> dict[str, Any]:
        return {"kv_bytes": self._n_layers * sum(x.nbytes for x in self._tensors[0])}

    def bytes_per_step(self, visited: float) -> float:
        """Every key and value, once."""
        return float(sum(x.nbytes for x in self._tensors[0]))


def measure_context(options: Options, context: int, advance: Callable[[str], None]) -> Iterator[Row]:
    """A row per method; a method that cannot be measured gives a row that says why."""
    rows = {method: blank_row(context, method) for method in options.methods}
    with PeakMemory(options.device) as setup:
        try:
            layers, tensors = _fill(options, context, advance)
        except FAILURES as error:
            for row in rows.values():
                fail(row, error)
            yield from rows.values()
            return
        methods, peaks = _make_methods(options, layers, tensors, rows, advance)
    steps = _run(options, methods, layers, rows, peaks, advance)
    for method in methods.values():
        row = rows[method.name]
        if row["reason"]:
            continue
        try:
            _summarise(row, steps[method.name], method, options)
            if options.check:
                _check(row, method, layers[0].queries[:, :, -CHECKED_STEPS:], options)
        except FAILURES as error:
            fail(row, error)
        row["peak_rss_bytes"] = max(setup.rss, peaks[method.name].rss)
        row["peak_device_bytes"] = peaks[method.name].device or None
    yield from rows.values()


def _n_steps(options: Options) -> int:
    return options.gen * (options.warmup + options.repeat)


def _fill(
    options: Options, context: int, advance: Callable[[str], None]
) -> tuple[list[Layer], list[tuple[Tensor, Tensor]]]:
    """Every layer's memory, and contiguous keys and values of as many layers as it takes to overflow the cache."""
    assert options.shape is not None
    dtype = getattr(torch, options.dtype)
    kv_bytes = 2 * options.shape.G * options.shape.D * dtype.itemsize * (context + _n_steps(options))
    n_contiguous = min(options.layers, -(-4 * cache_bytes() // kv_bytes)) if _has_rival(options) else 0
    kinds = [method for method in options.methods if method not in RIVALS]
    per_key = max((bytes_per_key(kind, options.shape.D) for kind in kinds), default=0)
    index_bytes = options.shape.G * context * per_key
    # One layer's vectors more: they are made as a whole before they are put where they belong.
    needed = (options.layers + n_contiguous + 2) * kv_bytes + options.layers * index_bytes
    require_memory(needed, f"{options.layers} layers of {context} tokens, with the tensors of the comparison,")
    layers: list[Layer] = []
    tensors: list[tuple[Tensor, Tensor]] = []
    for i in range(options.layers):
        advance(f"{context} tokens: vectors of layer {i}")
        layer, vectors = _fill_layer(options, options.shape, context, i)
        layers.append(layer)
        if i < n_contiguous:
            pair = [x[None, :, :context].contiguous().to(options.device) for x in (vectors.keys, vectors.values)]
            tensors.append((pair[0], pair[1]))
    return layers, tensors


def _has_rival(options: Options) -> bool:
    return any(method in rivals.FUNCTIONS for method in options.methods)


def _fill_layer(options: Options, shape: LayerShape, context: int, i: int) -> tuple[Layer, Vectors]:
    H, G, D = shape
    n_steps = _n_steps(options)
    config = options.config
    size, stride = config.build_queries, 1
    while -(-context // stride) >= 2 * size:
        stride *= 2
    n_spread, n_recent = -(-context // stride), min(RECENT_QUERIES, context)
    dtype = getattr(torch, options.dtype)
    vectors = shaped(
        context + n_steps, H, G, D, n_spread + n_recent, n_steps + CHECKED_STEPS, config.seed + 1000 * i, dtype
    )
    memory = LayerMemory(config, MemoryShape(G, D, D, dtype, context + n_steps))
    asked = vectors.prefill_queries.transpose(0, 1)
    recent = torch.zeros((RECENT_QUERIES, H, D), dtype=dtype)
    recent[[token % RECENT_QUERIES for token in range(context - n_recent, context)]] = asked[n_spread:]
    sample = {
        "sample_spread": asked[:n_spread].clone(),
        "sample_recent": recent,
        "sample_counts": torch.tensor([size, stride, n_spread, context - n_recent, context]),
    }
    device = torch.device(options.device)
    keys, values = vectors.keys[:, :context], vectors.values[:, :context]
    memory.store.append(keys, values)
    memory.window.append(keys[None].to(device), values[None].to(device))
    memory.sample.restore(sample)
    fresh = [x[None, :, context:].clone().to(device) for x in (vectors.keys, vectors.values)]
    return Layer(memory, vectors.queries[None].to(device), fresh[0], fresh[1]), vectors


def _twin_of(memory: LayerMemory, **options: Any) -> LayerMemory:
    """The same memory under other options that change nothing of what is stored."""
    twin = copy.copy(memory)
    twin.config = dataclasses.replace(memory.config, **options)
    return twin


def _twin(memory: LayerMemory, config: RetrievalConfig) -> LayerMemory:
    """Another memory over the same stored tokens. All twins append the same tokens, so they may share the arrays."""
    twin = LayerMemory(config, memory.shape._replace(capacity=1))
    twin.shape = memory.shape
    twin.store = copy.copy(memory.store)
    twin.window, twin.sample = memory.window.copy(), memory.sample.copy()
    return twin


def _make_methods(
    options: Options,
    layers: list[Layer],
    tensors: list[tuple[Tensor, Tensor]],
    rows: dict[str, Row],
    advance: Callable[[str], None],
) -> tuple[dict[str, Contender], dict[str, PeakMemory]]:
    methods: dict[str, Contender] = {}
    peaks = {name: PeakMemory(options.device) for name in options.methods}
    for name in options.methods:
        advance(f"{rows[name]['context']} tokens: preparing {name}")
        try:
            with peaks[name]:
                methods[name] = (
                    Rival(name, options, tensors) if name in rivals.FUNCTIONS else Retrieving(name, options, layers)
                )
        except FAILURES as error:
            fail(rows[name], error)
    return methods, peaks


def _run(
    options: Options,
    methods: dict[str, Contender],
    layers: list[Layer],
    rows: dict[str, Row],
    peaks: dict[str, PeakMemory],
    advance: Callable[[str], None],
) -> dict[str, list[Step]]:
    """Steps of every method, A B A B: repeat by repeat, each method in turn on the same fresh queries."""
    steps: dict[str, list[Step]] = {name: [] for name in methods}
    sweep = torch.ones(2 * cache_bytes(), dtype=torch.uint8) if options.device == "cpu" else None
    for turn in range(options.warmup + options.repeat):
        for name, method in methods.items():
            if rows[name]["reason"]:
                continue
            advance(f"{rows[name]['context']} tokens: {name}")
            try:
                with torch.no_grad(), peaks[name]:
                    run = [_step(method, n, layers, sweep) for n in _range(options.gen, turn)]
            except FAILURES as error:
                fail(rows[name], error)
                continue
            if turn >= options.warmup:
                steps[name] += run
    return steps


def _range(gen: int, turn: int) -> range:
    return range(gen * turn, gen * (turn + 1))


def _step(method: Contender, n: int, layers: list[Layer], sweep: Tensor | None) -> Step:
    """One step of all layers, as the mean over layers; the caches hold nothing of it beforehand."""
    if sweep is not None:
        sweep.add_(1)
    found = [method.step(n, layer.queries[:, :, n : n + 1].contiguous(), i) for i, layer in enumerate(layers)]
    return {part: sum(step[part] for step in found) / len(found) for part in found[0]}


def _summarise(row: Row, steps: list[Step], method: Any, options: Options) -> None:
    for part in PARTS:
        values = [1e3 * step[part] for step in steps if part in step]
        if values:
            row[f"{part}_ms"] = float(np.median(values))
            row["samples"][f"{part}_ms"] = values
    row["total_p20_ms"], row["total_p80_ms"] = np.percentile(row["samples"]["total_ms"], [20, 80]).tolist()
    visited = [step["visited"] for step in steps if "visited" in step]
    row["visited_pct"] = 100 * float(np.mean(visited)) if visited else None
    row["layers"], row["steps"] = options.layers, len(steps)
    row["all_layers_ms"] = options.layers * row["total_ms"]
    row["caches"] = "cold" if options.device == "cpu" else "as the steps leave them"
    row["bytes_per_step"] = method.bytes_per_step(float(np.mean(visited)) if visited else 0.0)
    row["gb_per_s"] = row["bytes_per_step"] / row["total_ms"] / 1e6
    row.update(method.sizes())
    row["status"] = "ok"


def _check(row: Row, method: Contender, queries: Tensor, options: Options) -> None:
    """A number needs a passing check: outputs must be attention over the keys that were selected."""
    with torch.no_grad():
        found = method.check(queries)
    allowed = TOLERANCE[getattr(torch, options.dtype)]
    row["recall"] = found.get("recall")
    # JSON knows no NaN.
    row["rel_error"] = found["rel_error"] if np.isfinite(found["rel_error"]) else None
    # Written so that NaN fails.
    row["check"] = "passed" if found["computation"] <= allowed else "failed"
    if row["check"] == "failed":
        row["status"] = "failed"
        row["reason"] = (
            f"the output is {found['computation']:.1e} (relative L2) away from attention over the keys it selected; "
            f"at most {allowed:.0e} is allowed for {options.dtype}"
        )
