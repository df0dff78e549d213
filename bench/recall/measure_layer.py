"""Search and attend, one fresh query at a time: rows of `bench recall`."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.methods.faiss_rivals import RIVALS as FAISS
from retrieval_attn.bench.methods.faiss_rivals import build_rival
from retrieval_attn.bench.recall.estimators import ESTIMATORS, Estimator
from retrieval_attn.bench.recall.ladders import bytes_read, ladder
from retrieval_attn.bench.recall.options import Options
from retrieval_attn.bench.recall.truth import Truth, check_hits
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.machine import cache_bytes
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.bench.vectors.sources import Vectors
from retrieval_attn.index import SearchResult, build_index
from retrieval_attn.kernels import TailSummary

Say = Callable[[str], None]

# Full attention takes long and varies little.
FOLDED_QUERIES = 8

# Keys and queries of the index that is built to get everything compiled.
_TINY = 256


class Layer(NamedTuple):
    """One layer to search in: where it is from, its vectors, and what is true of them."""

    source: str
    context: int
    seed: int
    vectors: Vectors
    truth: Truth

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values in bfloat16."""
        return 2 * (self.vectors.keys.numel() + self.vectors.values.numel())


class Tail(NamedTuple):
    """The summary that the estimator "tail" needs, made once for all methods."""

    summary: TailSummary | None
    seconds: float | None
    n_bytes: int | None


class Steps(NamedTuple):
    """What single steps gave: seconds of the search and of the whole step, hits, outputs (H, Dv); in query order."""

    search: list[float]
    total: list[float]
    hits: list[SearchResult]
    outs: list[Tensor]


def measure_layer(options: Options, layer: Layer, blank: Callable[..., Row], say: Say) -> Iterator[Row]:
    """A row per method and effort; a method that cannot be measured gives one row that says why.

    blank: makes an unmeasured row from the fields that are known.
    """
    tail = _summarise(options, layer)
    for method in options.methods:
        say(f"{layer.source}, {layer.context} keys, seed {layer.seed}: {method}")
        known = {"source": layer.source, "context": layer.context, "seed": layer.seed, "method": method}
        row = blank(**known)
        try:
            if method == "folded":
                yield _measure_folded(layer, row)
                continue
            searched = _Searched(method, options, layer)
        except FAILURES as error:
            yield fail(row, error)
            continue
        for effort in options.efforts.get(method) or searched.ladder:
            row = blank(**known, effort=effort)
            try:
                _measure(searched, effort, tail, row)
            except FAILURES as error:
                fail(row, error)
            yield row


class Caches:
    """Other memory that takes the place of everything in the caches. By NumPy, in this thread: another thread pool,
    still awake, would share the cores with the one that is timed next."""

    def __init__(self) -> None:
        self._other = np.ones(2 * cache_bytes(), np.uint8)

    def forget(self) -> None:
        self._other += 1


class _Searched:
    """One method over one layer: its index, and the lifted one if an estimator needs it."""

    def __init__(self, method: str, options: Options, layer: Layer) -> None:
        self.method, self.options, self.layer = method, options, layer
        names = [name for name in options.estimators if name == "topk" or method not in FAISS]
        self.estimators = {name: ESTIMATORS[name] for name in names}
        self.index, self.build_seconds = self._build(None)
        self.lifted: Any = None
        self.lift_seconds: float | None = None
        if any(estimator.lifted for estimator in self.estimators.values()):
            self.lifted, self.lift_seconds = self._build(layer.truth.scale)
        self._caches = Caches()

    def _build(self, lift: float | None) -> tuple[Any, float]:
        """The index and the seconds it took, without those for compiling its code."""
        keys, queries, seed = self.layer.vectors.keys, self.layer.vectors.prefill_queries, self.layer.seed
        if self.method not in FAISS:
            tiny = build_index(self.method, keys[:, :_TINY], queries[:, :_TINY], seed=seed, lift=lift)
            tiny.search(queries[:, :1].float(), 1)
        started = time.perf_counter()
        index: Any = (
            build_rival(self.method, keys, seed)
            if self.method in FAISS
            else build_index(self.method, keys, queries, seed=seed, lift=lift)
        )
        return index, time.perf_counter() - started

    @property
    def ladder(self) -> tuple[int | None, ...]:
        return ladder(self.method, self.layer.truth.k, self.index)

    def run(self, effort: int | None, estimator: Estimator | None, tail: Tail) -> Steps:
        """Every held-out query, alone, with cold caches. Without an estimator, searches are all that is done."""
        vectors, scale = self.layer.vectors, self.layer.truth.scale
        index = self.lifted if estimator is not None and estimator.lifted else self.index
        k = self.layer.truth.k + (index is self.lifted)
        steps = Steps([], [], [], [])
        for t in range(-1, vectors.queries.shape[1]):
            # The first query goes first once more, uncounted: what is done once in a process is done then.
            query = vectors.queries[:, max(t, 0) : max(t, 0) + 1].float().contiguous()
            self._caches.forget()
            started = time.perf_counter()
            hits = index.search(query, k, effort=effort)
            found = time.perf_counter()
            out = None
            if estimator is not None:
                out = estimator.attend(query, vectors, hits, scale, tail.summary, index)
            ended = time.perf_counter()
            if t >= 0:
                steps.search.append(found - started)
                steps.total.append(ended - started)
                steps.hits.append(hits)
                if out is not None:
                    steps.outs.append(out)
        return steps


def _summarise(options: Options, layer: Layer) -> Tail:
    if not any(ESTIMATORS[name].name == "tail" for name in options.estimators):
        return Tail(None, None, None)
    started = time.perf_counter()
    summary = TailSummary(layer.vectors.keys, layer.vectors.values)
    return Tail(summary, time.perf_counter() - started, summary.nbytes)


def _measure(searched: _Searched, effort: int | None, tail: Tail, row: Row) -> None:
    layer, truth = searched.layer, searched.layer.truth
    plain: Steps | None = None
    for name, estimator in searched.estimators.items():
        steps = searched.run(effort, estimator, tail)
        error = float(np.mean([truth.error(out, t) for t, out in enumerate(steps.outs)]))
        if not np.isfinite(error):
            raise ValueError(f"the output of the estimator {name!r} holds NaN or infinity")
        row[f"err_{name}"] = error
        row[f"step_{name}_us"] = 1e6 * float(np.median(steps.total))
        if plain is None and not estimator.lifted:
            plain = steps
    plain = plain or searched.run(effort, None, tail)
    _note_search(plain, searched, effort, row)
    index_bytes = searched.index.nbytes
    row.update(
        build_s=searched.build_seconds,
        lift_build_s=searched.lift_seconds,
        index_bytes=index_bytes,
        index_pct=100 * index_bytes / layer.kv_bytes,
        tail_build_s=tail.seconds,
        tail_bytes=tail.n_bytes,
        status="ok",
    )
    if searched.options.check:
        _check(row, searched, plain.hits)


def _note_search(steps: Steps, searched: _Searched, effort: int | None, row: Row) -> None:
    """What there is to say about the searches alone."""
    layer, truth = searched.layer, searched.layer.truth
    recalls = np.stack([truth.recall(hits, t) for t, hits in enumerate(steps.hits)])
    visited = float(np.mean([hits.visited for hits in steps.hits]))
    times = 1e6 * np.array(steps.search)
    low, high = np.percentile(times, [20, 80]).tolist()
    row.update(
        recall=float(recalls.mean()),
        worst_head_recall=float(recalls.mean(axis=0).min()),
        mass=float(np.mean([truth.mass(hits, t) for t, hits in enumerate(steps.hits)])),
        best_mass=float(truth.best_mass.mean()),
        visited_pct=100 * visited / layer.vectors.keys.shape[1],
        bytes_read=bytes_read(searched.method, searched.index, layer.vectors, visited, effort, truth.k),
        search_us=float(np.median(times)),
        search_p20_us=low,
        search_p80_us=high,
        queries=len(steps.hits),
    )
    row["samples"]["search_us"] = times.tolist()


def _check(row: Row, searched: _Searched, found: list[SearchResult]) -> None:
    """A number needs a passing check: keys once each, with the scores they have."""
    vectors = searched.layer.vectors
    wrong = None
    for t, hits in enumerate(found):
        query = vectors.queries[:, t : t + 1].float().contiguous()
        wrong = wrong or check_hits(hits, query, vectors.keys)
    row["check"] = "failed" if wrong else "passed"
    if wrong:
        row["status"], row["reason"] = "failed", wrong


def _measure_folded(layer: Layer, row: Row) -> Row:
    """Attention over all keys, each read once for its group: what a step takes that searches for nothing."""
    keys, values = layer.vectors.keys[None], layer.vectors.values[None]
    caches = Caches()
    times, errors = [], []
    for t in range(-1, min(FOLDED_QUERIES, layer.vectors.queries.shape[1])):
        query = layer.vectors.queries[None, :, max(t, 0) : max(t, 0) + 1].to(keys.dtype).contiguous()
        caches.forget()
        started = time.perf_counter()
        out = rivals.folded(query, keys, values)
        if t >= 0:
            times.append(1e6 * (time.perf_counter() - started))
            errors.append(layer.truth.error(out[0, :, 0], t))
    row.update(
        status="ok",
        recall=1.0,
        mass=1.0,
        best_mass=float(layer.truth.best_mass.mean()),
        visited_pct=100.0,
        bytes_read=float(keys.nbytes + values.nbytes),
        queries=len(times),
        err_topk=float(np.mean(errors)),
        step_topk_us=float(np.median(times)),
    )
    row["samples"]["step_topk_us"] = times
    return row
