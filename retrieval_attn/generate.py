"""The path of one request: prefill in chunks, builds in the background, then token after token."""

import time
from collections import Counter
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from retrieval_attn.attention.decode import StepClock
from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.attention.prefill_policy import EXACT_TAIL, PrefillCounts
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.layers import stock_layers, widest_text
from retrieval_attn.hf.passes import Passes
from retrieval_attn.hf.positions import made_for
from retrieval_attn.plan.terms import ModelShape, stored_kv

REPORT_EVERY_S = 0.2

# Passes of a long prefill after which a mark is made, for an interruption to go back to.
MARK_EVERY = 8

# Tokens of a context to which neither the model nor the user has set a limit.
UNBOUNDED = 1 << 60


@dataclass(frozen=True)
class Progress:
    """Where a request stands: phase "prefill" counts tokens, phase "build" indexes, with the part of those begun."""

    phase: str
    done: float
    total: int


OnProgress = Callable[[Progress], None]


@dataclass
class GenerationStats:
    """What a request cost. Seconds are wall clock, bytes are bytes, fractions are of 1.

    ttft_s: from the request to its first token. prefill_s: the prompt's forward passes. build_s: seconds that building
    indexes took, in the background; build_wait_s of them were waited for. tpot_s: mean seconds per later token, that
    wait excluded; itl_s lists each. visited_fraction: share of the far keys whose vector or code was read per step.
    near_s, search_s, gather_s, merge_s: parts of all decode steps together, over all layers. index: the kinds of index
    in use ("exact" while a context is shorter than `exact_below`); empty without far keys. index_reason: why.
    keys_per_head: far keys that a query head used in a step, on average. recovered_mass: share of the attention that
    these and the window hold, by the estimator's own account (1 for "topk", which knows no rest).
    marked_bytes: what layers with a window or a recurrent state held where the cache can go back to, in CPU memory.
    prefill_read: share of the keys before a prompt's tokens that their heads read (1: exact); None without a prompt, or
    with patterns of fixed sizes. prefill_patterns: share of heads and chunks by pattern.
    verified_steps: layer-steps that were also computed exactly (`verify_every`); over them verified_error and
    verified_worst_error, the relative L2 error of the output, mean and largest; verified_recall, the share of the best
    keys that was found; verified_mass, the share of the attention that what was read truly holds. None without any.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    build_s: float = 0.0
    build_wait_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    visited_fraction: float = 0.0
    keys_per_head: float = 0.0
    recovered_mass: float | None = None
    prefill_read: float | None = None
    prefill_patterns: dict[str, float] = field(default_factory=dict)
    verified_steps: int = 0
    verified_error: float | None = None
    verified_worst_error: float | None = None
    verified_recall: float | None = None
    verified_mass: float | None = None
    near_s: float = 0.0
    search_s: float = 0.0
    gather_s: float = 0.0
    merge_s: float = 0.0
    host_kv_bytes: int = 0
    marked_bytes: int = 0
    device_kv_bytes: int = 0
    index_bytes: int = 0
    rss_bytes: int = 0
    peak_device_bytes: int = 0
    index: str = ""
    index_reason: str = ""
    stop_reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Completion:
    """An answer: its text without special tokens, its token ids (the stop token included), and what it cost."""

    text: str
    token_ids: list[int]
    stats: GenerationStats


class Sampler:
    """Chooses tokens from logits, with transformers' own warpers."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor) -> int:
        """logits (1, V); raises ValueError if the model gave NaN."""
        logits = logits.float()
        if torch.isnan(logits).any():
            raise ValueError("the model's logits hold NaN; check its weights and dtype (try dtype='float32')")
        if self._greedy:
            return int(logits.argmax(-1))
        scores = self._warpers(None, logits)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class Request:
    """One answer to a token sequence whose first part a cache may hold already."""

    def __init__(
        self,
        model: Any,
        cache: RetrievalCache,
        sampling: Sampling,
        stop_ids: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.stats = GenerationStats()
        self._on_progress = on_progress or (lambda progress: None)

    @torch.no_grad()
    def tokens(self, ids: list[int]) -> Generator[int, None, None]:
        """Yield the answer's tokens; `ids` is the whole sequence, of which the cache holds a proper prefix.

        Ends after a stop token (yielded), `max_new_tokens`, or the model's longest context. An exception or a closed
        iterator leaves the cache whole: all layers hold the same tokens, a prefix of what was asked and yielded.
        """
        started = time.perf_counter()
        stats, cache = self._begun(ids)
        sample = Sampler(self.sampling, self.model.device)
        n_room = longest_context(self.model.config, cache.config, self.model.dtype) - len(ids)
        try:
            token = sample(self._prefill(ids))
            stats.ttft_s = time.perf_counter() - started
            builds, text = cache.start_builds(), list(ids)
            while True:
                stats.new_tokens += 1
                stats.e2e_s = time.perf_counter() - started
                stats.stop_reason = stop_reason(token, stats.new_tokens, self.sampling, self.stop_ids, n_room)
                yield token
                if stats.stop_reason:
                    return
                builds = self._await_builds(builds)
                text.append(token)
                token = self._step(text, sample)
        finally:
            cache.settle()
            summarise(stats, cache, cache.memories, self.model.device)

    @torch.no_grad()
    def read(self, ids: list[int]) -> None:
        """Prefill without answering, and begin the index builds; `ids` as in `tokens`."""
        stats, cache = self._begun(ids)
        try:
            self._prefill(ids, want_logits=False)
            cache.start_builds()
        finally:
            cache.settle()
            summarise(stats, cache, cache.memories, self.model.device)

    def _begun(self, ids: list[int]) -> tuple[GenerationStats, RetrievalCache]:
        """Count what is there already; see `RetrievalCache.forget_unless_turned_for` for why that may be nothing."""
        stats, cache = self.stats, self.cache
        # Not before: a session may have given the request a new cache.
        self._passes = Passes(self.model, cache)
        cache.forget_unless_turned_for(len(ids))
        stats.prompt_tokens, stats.reused_tokens = len(ids), cache.get_seq_length()
        cache.reset_clocks()
        return stats, cache

    def _prefill(self, ids: list[int], want_logits: bool = True) -> Tensor:
        """Run what the cache lacks of the text, chunk by chunk; returns the logits (1, V) of the last, if wanted."""
        started, logits = time.perf_counter(), torch.empty(0)
        held = self.cache.get_seq_length()
        n, done = len(ids) - held, 0
        follows = held > 0 and self.cache.config.followup == "retrieve"
        # What was held, a document or a turn before, is gone back to for another question.
        self.cache.mark()
        self._on_progress(Progress("prefill", 0, n))
        with self.cache.working(), self.cache.retrieving() if follows else self.cache.exact():
            for n_passes, stop in enumerate(self._stops(n, want_logits), 1):
                part = torch.tensor([ids[held + done : held + stop]], device=self.model.device)
                if want_logits and stop == n:
                    logits = self._passes.logits(part, len(ids))
                else:
                    self._passes.read(part, len(ids))
                if stop == n - want_logits:
                    self.cache.mark()
                elif stop < n and n_passes % MARK_EVERY == 0:
                    self.cache.mark(passing=True)
                done = stop
                self._on_progress(Progress("prefill", done, n))
        self.stats.prefill_s += time.perf_counter() - started
        return logits

    def _stops(self, n_tokens: int, answers: bool) -> list[int]:
        """Where passes end. One ends before the last token, if there are layers that can go back only to what was held
        between two passes: that token is run again when its answer is given anew."""
        ends = set(chunk_ends(n_tokens, self.cache.config))
        if answers and n_tokens > 1 and self.cache.wants_marks:
            ends.add(n_tokens - 1)
        return sorted(ends)

    def _await_builds(self, builds: list[Any]) -> list[Any]:
        """Wait for the indexes with progress, once; later steps have none to wait for."""
        if builds:
            started = time.perf_counter()
            follow_builds(self.cache, self._on_progress)
            self.stats.build_wait_s = time.perf_counter() - started
            self.stats.build_s = sum(memory.far_index.build_seconds for memory in self.cache.memories)
        return []

    def _step(self, text: list[int], sample: Sampler) -> int:
        """The token after a text of which the cache lacks the last, or all."""
        started = time.perf_counter()
        if self.cache.forget_unless_turned_for(len(text)):
            token = sample(self._prefill(text))
        else:
            with self.cache.working():
                last = torch.tensor([text[-1:]], device=self.model.device)
                token = sample(self._passes.logits(last, len(text)))
        self.stats.itl_s.append(time.perf_counter() - started)
        return token


def stop_reason(token: int, n_new: int, sampling: Sampling, stop_ids: Container[int], n_room: int) -> str:
    """Why an answer ends with `token`, its n_new-th: "stop", "length", or "context" if the model has room for no more
    than `n_room` new tokens; empty if it goes on."""
    if token in stop_ids:
        return "stop"
    if n_new >= sampling.max_new_tokens:
        return "length"
    return "context" if n_new >= n_room else ""


def summarise(
    stats: GenerationStats, cache: RetrievalCache, memories: Sequence[LayerMemory], device: torch.device
) -> None:
    """Fill in what the cache's clocks measured, over all its sequences, and what `memories` hold."""
    clocks = [layer.clock for layer in cache.retrieval_layers]
    for part in ("near", "search", "gather", "merge"):
        setattr(stats, f"{part}_s", sum(getattr(clock, part) for clock in clocks))
    far = sum(clock.far for clock in clocks)
    stats.visited_fraction = sum(clock.visited for clock in clocks) / far if far else 0.0
    if steps := sum(clock.steps for clock in clocks):
        stats.keys_per_head = sum(clock.used for clock in clocks) / steps
        stats.recovered_mass = sum(clock.recovered for clock in clocks) / steps
    _summarise_checks(stats, clocks)
    _summarise_prefill(stats, [layer.prefilled for layer in cache.retrieval_layers])
    stats.tpot_s = float(np.mean(stats.itl_s)) if stats.itl_s else 0.0
    stats.host_kv_bytes = sum(memory.store.nbytes for memory in memories)
    stats.marked_bytes = cache.marked_bytes
    stats.device_kv_bytes = sum(memory.window.nbytes + memory.device_prefix.nbytes for memory in memories)
    indexes = [index for memory in memories if (index := memory.far_index.if_built) is not None]
    stats.index_bytes = sum(index.nbytes for index in indexes)
    stats.index = ", ".join(sorted({index.kind for index in indexes}))
    stats.index_reason = "; ".join(sorted({memory.far_index.reason for memory in memories} - {""}))
    stats.rss_bytes = psutil.Process().memory_info().rss
    if device.type == "cuda":
        stats.peak_device_bytes = torch.cuda.max_memory_allocated(device)


def _summarise_prefill(stats: GenerationStats, layers: Sequence[PrefillCounts]) -> None:
    read = [counts.n_read for counts in layers if counts.n_read is not None]
    if (visible := sum(counts.n_visible for counts in layers)) and len(read) == len(layers):
        stats.prefill_read = sum(read) / visible
    kinds = sum((counts.kinds for counts in layers), Counter())
    stats.prefill_patterns = {kind: n / kinds.total() for kind, n in kinds.most_common()}


def _summarise_checks(stats: GenerationStats, clocks: Sequence[StepClock]) -> None:
    n = stats.verified_steps = sum(clock.checks for clock in clocks)
    if n:
        for part in ("error", "recall", "mass"):
            setattr(stats, f"verified_{part}", sum(getattr(clock, part) for clock in clocks) / n)
        stats.verified_worst_error = max(clock.worst_error for clock in clocks)


def chunk_ends(n_tokens: int, config: RetrievalConfig) -> list[int]:
    """Where the chunks of a prompt end; if prefill may be sparse, the last tokens are a chunk of their own, and exact.

    >>> chunk_ends(5000, RetrievalConfig(prefill="auto"))
    [2048, 4096, 4744, 5000]
    """
    tail = 0 if config.prefill == "dense" else min(EXACT_TAIL, n_tokens)
    body = n_tokens - tail
    ends = [*range(config.prefill_chunk, body, config.prefill_chunk), body]
    ends += [*range(body + config.prefill_chunk, n_tokens, config.prefill_chunk), n_tokens]
    return sorted({end for end in ends if end > 0})


def follow_builds(cache: RetrievalCache, on_progress: OnProgress) -> None:
    """Wait for all indexes that are being built, reporting how far they are; raises the error of one that failed."""
    building = [(memory, build) for memory in cache.memories if (build := memory.far_index.building) is not None]
    if not building:
        return
    on_progress(Progress("build", 0, len(building)))
    for i, (memory, build) in enumerate(building):
        while not build.wait(REPORT_EVERY_S):
            on_progress(Progress("build", i + memory.far_index.build_fraction, len(building)))
        memory.index()
        on_progress(Progress("build", i + 1, len(building)))


def longest_context(model_config: Any, config: RetrievalConfig, dtype: torch.dtype, n_sequences: int = 1) -> int:
    """Tokens that the model was made for, with its scaled positions, or what the config's limits say; effectively
    unbounded if neither says anything. `max_tokens` may be more than the model was made for.

    dtype: of the model's numbers, by which its keys and values are counted. n_sequences: that share one cache.
    """
    window = widest_text(stock_layers(model_config), model_config)
    most = min(config.max_tokens or made_for(model_config) or UNBOUNDED, window or UNBOUNDED)
    if config.max_host_bytes is None:
        return most
    return min(most, config.max_host_bytes // (n_sequences * stored_kv(ModelShape.of(model_config, dtype), 1, config)))
