"""Methods of ours: a conversation through `RetrievalCache`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from retrieval_attn.bench.methods.faiss_rivals import FrozenIndex
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.talk import Answer, Fed, Read, bytes_of, forward
from retrieval_attn.config import Sampling
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.far.index_build import needs_tail
from retrieval_attn.generate import Request, follow_builds
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.kernels import TailSummary
from retrieval_attn.llm import LLM


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
        device = self._llm.model.device.type
        others = sum(bytes_of(x, device) for x in cache.layers if not isinstance(x, RetrievalLayer))
        return Answer(
            text=self._llm.decode(tokens),
            token_ids=tokens,
            ttft_s=stats.ttft_s,
            itl_s=stats.itl_s,
            visited=stats.visited_fraction if searched else None,
            host_kv_bytes=stats.host_kv_bytes,
            device_kv_bytes=stats.device_kv_bytes + others,
            index_bytes=stats.index_bytes,
        )

    def _request(self, cache: RetrievalCache, max_new_tokens: int) -> Request:
        return Request(self._llm.model, cache, Sampling(max_new_tokens=max_new_tokens), self._llm.stop_ids())

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Fed:
        """Go on with ids, one token at a time, whatever the model would say itself."""
        self._cache.reset_clocks()
        logits, laps = [], []
        with self._cache.working():
            for token in ids:
                started = time.perf_counter()
                logits.append(forward(self._llm.model, [token], self._cache).float().cpu())
                laps.append(time.perf_counter() - started)
        clocks = [layer.clock for layer in self._cache.retrieval_layers]
        far = sum(clock.far for clock in clocks)
        return Fed(torch.cat(logits), laps, sum(clock.visited for clock in clocks) / far if far else 0.0)


def start_ours(
    llm: LLM, method: Method, ids: list[int], read: Read | None, on_progress: Callable[[Any], None] | None
) -> OurTalk:
    """The method behind ids, which `read` has read or it reads itself; its indexes are built."""
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
    """Give every layer a graph of faiss's over its far keys."""
    for memory in cache.memories:
        far = memory.far()
        if n := n_covered(far.length):
            covered = far.before(n)
            tail = TailSummary(*covered) if needs_tail(memory.config) else None
            memory.far_index.adopt(
                FrozenIndex.build(covered.keys, memory.config.seed), tail, "asked for by a benchmark"
            )
