"""Methods of stock transformers: its attention, and one of its caches."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.streaming import StreamingLayer
from retrieval_attn.bench.methods.talk import Answer, Fed, Read, bytes_of, forward
from retrieval_attn.bench.shared.machine import synchronize
from retrieval_attn.hf.attention import NAME
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.hf.layers import attends_to_all
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import LLM


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
                tokens.append(int(forward(self._llm.model, new, cache).argmax(-1)))
                laps.append(time.perf_counter() - started)
                cache = _branch(cache) if len(tokens) == 1 else cache
                new = tokens[-1:]
        on_cpu = self._llm.model.device.type == "cpu"
        held = {where: sum(bytes_of(layer, where) for layer in self._cache.layers) for where in ("cpu", "cuda")}
        device, host = (held["cpu"], 0) if on_cpu else (held["cuda"], held["cpu"])
        return Answer(self._llm.decode(tokens), tokens, laps[0], laps[1:], self._visited, host, device, 0)

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Fed:
        """As `OurTalk.feed`."""
        logits, laps = [], []
        with attending(self._llm.model, self._implementation):
            for token in ids:
                started = time.perf_counter()
                logits.append(forward(self._llm.model, [token], self._cache).float().cpu())
                laps.append(time.perf_counter() - started)
        return Fed(torch.cat(logits), laps, None)


def _branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from here by itself. Stock layers put new tensors in the place of old ones and change none;
    those of other kinds, with states that change in place, are copied."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in cache.layers]
    return twin


@torch.no_grad()
def start_stock(llm: LLM, method: Method, ids: list[int], read: Read | None) -> StockTalk:
    """The method behind ids, which `read` has read or it reads itself."""
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
            llm.model.base_model(input_ids=tokens, **cache_argument(cache), use_cache=True)
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
        StreamingLayer(method.config.n_sink, method.config.n_local) if attends_to_all(layer, model.config) else layer
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
