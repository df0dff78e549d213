"""Builds the index over the far keys, and the summary of what it may not find."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_choice import IndexChoice
from retrieval_attn.index import Index, build_index
from retrieval_attn.kernels import TailSummary


@dataclass(frozen=True)
class BuiltIndex:
    """An index and why it is of its kind, the summary of what it may not find if the estimator wants one, and the
    seconds that both took."""

    index: Index
    reason: str
    tail: TailSummary | None
    seconds: float


def build_far_index(
    config: RetrievalConfig,
    choice: IndexChoice,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    scale: float,
    cancelled: Callable[[], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> BuiltIndex:
    """Index the far keys (G, S, D) and summarise them and their values, taught by sampled queries (H, T, D), if any.

    All in CPU memory. scale: of the softmax, for the "lift" estimator.
    """
    started = time.perf_counter()
    index = build_index(
        choice.kind,
        keys,
        queries,
        seed=config.seed,
        lift=scale if config.estimator == "lift" else None,
        cancel=cancelled,
        progress=progress,
    )
    tail = TailSummary(keys, values) if needs_tail(config) else None
    return BuiltIndex(index, choice.reason, tail, time.perf_counter() - started)


def needs_tail(config: RetrievalConfig) -> bool:
    """Whether steps ask for the mass of what was not found."""
    return config.estimator == "tail" or config.mass is not None
