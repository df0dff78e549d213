"""Ways to go on with one prompt: ours, stock transformers', and what each of them costs per turn.

method = parse_method("graph:top_k=200:followup=exact", config)
bench = Bench(llm, load)
read = bench.read(ids)                       # exact prefill, once, for every method that can share it
talk = bench.start(method, ids, read)        # builds the index, fills a cache, ...
said = talk.answer([*ids, *question], 32)
"""

import gc
import time
from collections.abc import Callable
from typing import Any

from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.names import OURS
from retrieval_attn.bench.methods.ours import start_ours
from retrieval_attn.bench.methods.stock import start_stock
from retrieval_attn.bench.methods.talk import Read, Talk
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.generate import Request
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.llm import LLM


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
            return start_ours(llm, method, ids, shared, on_progress)
        return start_stock(llm, method, ids, shared)

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
