"""Ways to go on with one prompt, by name: ours, stock transformers', and what each of them costs per turn.

method = parse_method("graph:top_k=200:followup=exact", config)
bench = Bench(llm, load)
read = bench.read(ids)                       # exact prefill, once, for every method that can share it
talk = bench.start(method, ids, read)        # builds the index, fills a cache, ...
said = talk.answer([*ids, *question], 32)
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.methods.faiss_rivals import FrozenIndex
from retrieval_attn.bench.methods.streaming import StreamingLayer
from retrieval_attn.bench.shared.machine import synchronize
from retrieval_attn.config import INDEX_KINDS, RetrievalConfig, Sampling
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.far.index_build import needs_tail
from retrieval_attn.generate import Request, follow_builds
from retrieval_attn.hf.attention import NAME
from retrieval_attn.hf.cache import KEPT_BY_FORKS, RetrievalCache
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.kernels import TailSummary
from retrieval_attn.llm import LLM
from retrieval_attn.terminal.option_language import Word, parse_pairs, unknown, words_of

OURS = (*INDEX_KINDS, "hnsw")
STOCK = ("full", "folded", "streaming", "offloaded", "quantized")
METHODS = (*STOCK, *OURS)

WEIGHTS = ("int8", "int4")

# Options of methods beside the words of `RetrievalConfig`, and which methods take them.
_OTHER = {
    "weights": Word("weights", "weights", "str", "auto", ("auto", *WEIGHTS), "Weights are quantised so.", ""),
    "bits": Word("bits", "bits", "int", 4, (), "Keys and values have this many bits.", ""),
    "backend": Word("backend", "backend", "str", "hqq", (), "This library quantises keys and values.", ""),
}
_TAKERS = {"weights": (*OURS, *STOCK), "bits": ("quantized",), "backend": ("quantized",)}


@dataclass(frozen=True)
class Method:
    """A method and its options. label: as the user wrote it; two methods of one run differ in it."""

    label: str
    name: str
    config: RetrievalConfig
    weights: str = "auto"
    options: tuple[tuple[str, str], ...] = ()

    @property
    def shares_prefill(self) -> bool:
        """Whether it goes on from an exact prefill by the same weights, kept as that one keeps it."""
        plain = RetrievalConfig()
        same = all(getattr(self.config, name) == getattr(plain, name) for name in KEPT_BY_FORKS)
        return self.weights == "auto" and same


def parse_method(text: str, config: RetrievalConfig) -> Method:
    """A method from NAME or NAME:OPTION=VALUE:..., options of `config` first.

    Raises ValueError naming what is unknown, with what comes near to it.
    """
    name, *pairs = text.strip().split(":")
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    words = _words_of(name)
    said = parse_pairs(pairs, words, f"method {name!r} in {text!r}")
    others = {option: str(said.pop(option)) for option in _OTHER if option in said}
    weights = others.pop("weights", "auto")
    if name in OURS:
        said["index"] = "auto" if name == "hnsw" else name
    return Method(text.strip(), name, replace(config, **said), weights, tuple(others.items()))


def _words_of(name: str) -> dict[str, Word]:
    """What a method takes: the config's words if it is ours, those of the window if it streams, and its own."""
    others = {option: word for option, word in _OTHER.items() if name in _TAKERS[option]}
    if name not in (*OURS, "streaming"):
        return others
    words = {option: word for option, word in words_of(RetrievalConfig).items() if option != "index"}
    return others | (words if name in OURS else {option: words[option] for option in ("n_sink", "n_local")})


class Answer(NamedTuple):
    """What a method said, and what that cost: seconds from asking to the first token and for each later one, the share
    of the far keys that its searches looked at (None if it made none), bytes of keys and values and of indexes."""

    text: str
    token_ids: list[int]
    ttft_s: float
    itl_s: list[float]
    visited: float | None
    host_kv_bytes: int
    device_kv_bytes: int
    index_bytes: int


class Talk(Protocol):
    """A prompt that was read, and what is asked after it."""

    read_s: float
    build_s: float

    def fork(self) -> "Talk":
        """Another one from here on; what is asked of either, the other does not see."""

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        """Greedy tokens after `ids`, which begin with what was read and asked so far; only what follows is run."""


class Read(NamedTuple):
    """A prompt that was read exactly, and the seconds it took."""

    ids: list[int]
    cache: RetrievalCache
    seconds: float


class Bench:
    """One model, and whatever methods ask of it: the same weights for ours and stock attention, quantised ones on the
    side.

    load: makes the model with other weights, "int8" or "int4". Not for use from two threads.
    """

    def __init__(self, llm: LLM, load: Callable[[str], LLM]) -> None:
        self.llm = llm
        self._load = load
        self._quantised: dict[str, LLM] = {}

    def read(self, ids: list[int], on_progress: Callable[[Any], None] | None = None, after: Read | None = None) -> Read:
        """Read ids exactly, by our prefill; what `after` has read of them is not read again."""
        config = RetrievalConfig(index="exact", seed=self.llm.config.seed, threads=self.llm.config.threads)
        cache = RetrievalCache(self.llm.model.config, config) if after is None else after.cache.fork()
        started = time.perf_counter()
        Request(self.llm.model, cache, Sampling(), (), on_progress).read(ids)
        cache.cancel_builds()
        return Read(ids, cache, time.perf_counter() - started + (0 if after is None else after.seconds))

    def start(
        self, method: Method, ids: list[int], read: Read | None = None, on_progress: Callable[[Any], None] | None = None
    ) -> Talk:
        """The method after it has read ids: from a shared prefill if there is one and it may, else by itself.

        Raises ImportError, MemoryError, RuntimeError or ValueError for what the machine or the model does not have.
        """
        llm = self._with_weights(method.weights)
        shared = read if method.shares_prefill else None
        if method.name in OURS:
            return _start_ours(llm, method, ids, shared, on_progress)
        return _start_stock(llm, method, ids, shared)

    def prepare(self, method: Method) -> None:
        """Load what the method needs beside the model, so that this is not measured with it."""
        self._with_weights(method.weights)

    def _with_weights(self, weights: str) -> LLM:
        if weights == "auto":
            return self.llm
        if weights not in self._quantised:
            # One at a time: they may be large.
            self._quantised.clear()
            gc.collect()
            self._quantised[weights] = self._load(weights)
        return self._quantised[weights]


class OurTalk:
    """A conversation through `RetrievalCache`. As in `StockTalk`, what was answered does not stay."""

    def __init__(self, llm: LLM, cache: RetrievalCache, read_s: float, build_s: float) -> None:
        self._llm, self._cache = llm, cache
        self.read_s, self.build_s = read_s, build_s
        # Sliding-window layers forget what they would need to go back; of such a cache, a fork is asked instead.
        self._goes_back = len(cache.retrieval_layers) == len(cache.layers)

    def fork(self) -> "OurTalk":
        return OurTalk(self._llm, self._cache.fork(), self.read_s, self.build_s)

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        cache = self._cache if self._goes_back else self._cache.fork()
        request = self._request(cache, max_new_tokens)
        tokens = list(request.tokens(list(ids)))
        if self._goes_back:
            cache.crop(len(ids) - cache.get_seq_length())
        else:
            self._request(self._cache, 1).read(list(ids))
        stats, searched = request.stats, any(layer.clock.far for layer in cache.retrieval_layers)
        others = sum(_nbytes(x, self._llm.model.device.type) for x in cache.layers if not isinstance(x, RetrievalLayer))
        return Answer(
            self._llm.decode(tokens), tokens, stats.ttft_s, stats.itl_s, stats.visited_fraction if searched else None,
            stats.host_kv_bytes, stats.device_kv_bytes + others, stats.index_bytes,
        )  # fmt: skip

    def _request(self, cache: RetrievalCache, max_new_tokens: int) -> Request:
        return Request(self._llm.model, cache, Sampling(max_new_tokens=max_new_tokens), self._llm.stop_ids())

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> tuple[Tensor, list[float], float | None]:
        """Go on with ids, one token at a time, whatever the model would say itself.

        Returns the logits after each, (n, V) float32 in CPU memory, its seconds, and the share of the far keys that was
        looked at (None: all of them).
        """
        self._cache.reset_clocks()
        logits, laps = [], []
        with self._cache.working():
            for token in ids:
                started = time.perf_counter()
                logits.append(_forward(self._llm.model, [token], self._cache).float().cpu())
                laps.append(time.perf_counter() - started)
        clocks = [layer.clock for layer in self._cache.retrieval_layers]
        far = sum(clock.far for clock in clocks)
        return torch.cat(logits), laps, sum(clock.visited for clock in clocks) / far if far else 0.0


def _start_ours(
    llm: LLM, method: Method, ids: list[int], read: Read | None, on_progress: Callable[[Any], None] | None
) -> OurTalk:
    if read is None:
        started = time.perf_counter()
        cache = RetrievalCache(llm.model.config, method.config)
        Request(llm.model, cache, Sampling(), (), on_progress).read(ids)
        read_s = time.perf_counter() - started
    else:
        cache, read_s = read.cache.fork(method.config), read.seconds
    started = time.perf_counter()
    if method.name == "hnsw":
        cache.cancel_builds()
        build_hnsw(cache)
    else:
        cache.start_builds()
        follow_builds(cache, on_progress or (lambda progress: None))
    return OurTalk(llm, cache, read_s, time.perf_counter() - started)


def build_hnsw(cache: RetrievalCache) -> None:
    for memory in cache.memories:
        far = memory.far()
        if n := n_covered(far.length):
            covered = far.before(n)
            tail = TailSummary(*covered) if needs_tail(memory.config) else None
            memory.far_index.adopt(
                FrozenIndex.build(covered.keys, memory.config.seed), tail, "asked for by a benchmark"
            )


class StockTalk:
    """A conversation through stock transformers' attention and one of its caches, greedy.

    What was asked stays in the cache, what was answered does not: the next turn may follow another answer.
    """

    def __init__(
        self, llm: LLM, implementation: str, cache: DynamicCache, read_s: float, visited: float | None
    ) -> None:
        self._llm, self._implementation, self._cache, self._visited = llm, implementation, cache, visited
        self.read_s, self.build_s = read_s, 0.0

    def fork(self) -> "StockTalk":
        return StockTalk(self._llm, self._implementation, _branch(self._cache), self.read_s, self._visited)

    @torch.no_grad()
    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        tokens: list[int] = []
        laps: list[float] = []
        stops = self._llm.stop_ids()
        with attending(self._llm.model, self._implementation):
            new, cache = list(ids[self._cache.get_seq_length() :]), self._cache
            most = min(max_new_tokens, self._llm.max_tokens - len(ids))
            while not tokens or (tokens[-1] not in stops and len(tokens) < most):
                started = time.perf_counter()
                tokens.append(int(_forward(self._llm.model, new, cache).argmax(-1)))
                laps.append(time.perf_counter() - started)
                cache = _branch(cache) if len(tokens) == 1 else cache
                new = tokens[-1:]
        on_cpu = self._llm.model.device.type == "cpu"
        held = {where: sum(_nbytes(layer, where) for layer in self._cache.layers) for where in ("cpu", "cuda")}
        device, host = (held["cpu"], 0) if on_cpu else (held["cuda"], held["cpu"])
        return Answer(self._llm.decode(tokens), tokens, laps[0], laps[1:], self._visited, host, device, 0)

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> tuple[Tensor, list[float], float | None]:
        """As `OurTalk.feed`."""
        logits, laps = [], []
        with attending(self._llm.model, self._implementation):
            for token in ids:
                started = time.perf_counter()
                logits.append(_forward(self._llm.model, [token], self._cache).float().cpu())
                laps.append(time.perf_counter() - started)
        return torch.cat(logits), laps, None


def _branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from here by itself. Stock layers put new tensors in the place of old ones and change none;
    those of other kinds, with states that change in place, are copied."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in cache.layers]
    return twin


def _nbytes(layer: Any, where: str) -> int:
    """Bytes that a stock cache layer holds on "cpu" or "cuda"."""
    kept = (getattr(layer, name, None) for name in ("keys", "values", "_quantized_keys", "_quantized_values"))
    return sum(x.nbytes for part in kept for x in _plain(part) if x.device.type == where)


def _plain(held: Any) -> Iterator[Tensor]:
    """The tensors that something is made of: a quantised one says of itself what it would be if it were not."""
    if isinstance(held, tuple | list):
        for part in held:
            yield from _plain(part)
    elif isinstance(held, dict):
        yield from _plain(list(held.values()))
    elif isinstance(held, Tensor):
        names = held.__tensor_flatten__()[0] if hasattr(held, "__tensor_flatten__") else None
        yield from [held] if names is None else _plain([getattr(held, name) for name in names])


def _forward(model: Any, ids: Sequence[int], cache: DynamicCache) -> Tensor:
    tokens = torch.tensor([list(ids)], device=model.device)
    start = cache.get_seq_length()
    positions = torch.arange(start, start + tokens.shape[1], device=model.device)[None]
    return model(
        input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[:, -1]


@torch.no_grad()
def _start_stock(llm: LLM, method: Method, ids: list[int], read: Read | None) -> StockTalk:
    implementation = rivals.FOLDED if method.name == "folded" else "sdpa"
    cache = _CACHES[method.name](llm.model, method)
    started = time.perf_counter()
    if read is not None:
        _fill(cache, read.cache, llm.model)
        read_s = read.seconds
    else:
        # One pass needs no mask, and takes half the time that chunks take.
        with attending(llm.model, implementation):
            tokens = torch.tensor([ids], device=llm.model.device)
            llm.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        synchronize(str(llm.model.device))
        read_s = time.perf_counter() - started
    return StockTalk(llm, implementation, cache, read_s, 0.0 if method.name == "streaming" else 1.0)


def _fill(cache: DynamicCache, source: RetrievalCache, model: Any) -> None:
    """Give a stock cache the keys and values that ours has read; layers that are stock already are copied."""
    for i, layer in enumerate(source.layers):
        if not isinstance(layer, RetrievalLayer):
            cache.layers[i] = copy.deepcopy(layer)
            continue
        memory = layer.memories[0]
        keys, values = memory.store.read(0, memory.length)
        cache.update(keys[None].to(model.device, copy=True), values[None].to(model.device, copy=True), i)


def _streaming(model: Any, method: Method) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        StreamingLayer(method.config.n_sink, method.config.n_local) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def _offloaded(model: Any, method: Method) -> DynamicCache:
    if model.device.type != "cuda":
        raise RuntimeError("transformers' offloaded cache moves layers between a GPU and the CPU; there is no GPU here")
    return DynamicCache(config=model.config, offloading=True)


def _quantized(model: Any, method: Method) -> DynamicCache:
    given = dict(method.options)
    bits = int(given.get("bits", 4))
    return QuantizedCache(given.get("backend", "quanto"), model.config, nbits=bits)


_CACHES: dict[str, Callable[[Any, Method], DynamicCache]] = {
    "full": lambda model, method: DynamicCache(config=model.config),
    "folded": lambda model, method: DynamicCache(config=model.config),
    "streaming": _streaming,
    "offloaded": _offloaded,
    "quantized": _quantized,
}


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Inside, the model attends by another implementation that transformers knows; then by ours again."""
    with rivals.folded_registered():
        model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            model.set_attn_implementation(NAME)
