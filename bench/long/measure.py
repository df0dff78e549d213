"""Speed and memory along one long answer."""

import statistics
import time
from collections.abc import Iterator

import numpy as np
import psutil

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.bench.demo import make_questions
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.config import Sampling
from retrieval_attn.generate import Request
from retrieval_attn.llm import LLM


def measure(llm: LLM, n_prompt: int, n_answer: int, every: int, seed: int) -> Iterator[Row]:
    """A row for every so many tokens of the answer."""
    _, questions = make_questions(llm, n_prompt, 1, seed)
    sampling = Sampling(max_new_tokens=n_answer, temperature=1.0, seed=seed)
    request = Request(llm.model, llm.new_cache(), sampling, stop_ids=())
    steps: list[float] = []
    started = 0.0
    for i, _ in enumerate(request.tokens(questions[0].ids)):
        now = time.perf_counter()
        # The first token waits for the prompt, the second for the index.
        if i >= 2:
            steps.append(now - started)
        if len(steps) == every or (i + 1 == n_answer and steps):
            yield _row(i + 1, steps, request.cache.memories)
            steps.clear()
        started = time.perf_counter()


def _row(n_new: int, steps: list[float], memories: list[LayerMemory]) -> Row:
    indexes = [memory.far_index.if_built for memory in memories]
    covered = [index.n_keys / memory.split.n_far for index, memory in zip(indexes, memories, strict=True) if index]
    return {
        "new_tokens": n_new,
        "tokens_per_s": len(steps) / sum(steps),
        "median_ms": 1e3 * statistics.median(steps),
        "p99_ms": 1e3 * float(np.percentile(steps, 99)),
        "worst_ms": 1e3 * max(steps),
        "rss_mb": psutil.Process().memory_info().rss / 1e6,
        "kv_mb": sum(memory.store.nbytes for memory in memories) / 1e6,
        "index_mb": sum(index.nbytes for index in indexes if index) / 1e6,
        "indexed": statistics.mean(covered) if covered else 0.0,
    }
