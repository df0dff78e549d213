"""How a layer attends to a chunk of a prompt: decided once, before it, by one object that asking does not change."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.attention.to_device import heads_at_once, tokens_on_device
from retrieval_attn.config import DENSE_BELOW, FEWEST_SPARSE, RetrievalConfig
from retrieval_attn.kernels import HeadPattern
from retrieval_attn.kernels.sparse.choose import HeadChoice
from retrieval_attn.kernels.sparse.lists import why_not_sparse
from retrieval_attn.kernels.sparse.patterns import DEFAULT_SIZES

# Tokens at the end of a prompt that are exact; the question stands there.
EXACT_TAIL = 256


class ChunkPlan(NamedTuple):
    """How one chunk of new tokens attends.

    sparse: by patterns, else exactly. patterns: one for each query head, or None where each head chooses its own.
    n_heads: KV heads that sparse attention takes at a time. n_on_device: of a context's first chunk, how many of its
    tokens prefill may keep on the device; None for later chunks. rests: exact because heads that were asked lately had
    no use for patterns. hindrance: why no sparse kernel takes these tensors; empty if one does, or none is wanted.
    """

    sparse: bool
    patterns: Sequence[HeadPattern] | None = None
    n_heads: int = 0
    n_on_device: int | None = None
    rests: bool = False
    hindrance: str = ""


@dataclass(frozen=True)
class PrefillPolicy:
    """Decides how one layer attends to a prompt, chunk by chunk. patterns: of its query heads, if a file gives them."""

    config: RetrievalConfig
    patterns: Sequence[HeadPattern] = ()

    def decide(self, query: Tensor, memory: LayerMemory) -> ChunkPlan:
        """The plan for the chunk with these queries (1, H, T, D), which come after the tokens of `memory`.

        Raises ValueError if the config names patterns that no sparse kernel can run on this model.
        """
        config, n_after = self.config, memory.length + query.shape[2]
        n_on_device = tokens_on_device(config, memory, query.device) if memory.length == 0 else None
        exact = ChunkPlan(sparse=False, n_on_device=n_on_device)
        if config.prefill == "dense" or query.shape[2] < FEWEST_SPARSE:
            return exact
        if hindrance := self._hindrance(query, memory):
            return exact._replace(hindrance=hindrance)
        sparse = exact._replace(sparse=True, n_heads=heads_at_once(memory, n_after, query.device))
        if config.prefill != "auto":
            return sparse._replace(patterns=self.patterns or [DEFAULT_SIZES[config.prefill]] * query.shape[1])
        if n_after < (DENSE_BELOW if config.dense_below is None else config.dense_below):
            return exact
        return sparse if memory.rest.is_over else exact._replace(rests=True)

    def _hindrance(self, query: Tensor, memory: LayerMemory) -> str:
        shape = memory.shape
        reason = why_not_sparse((query.dtype, shape.dtype), shape.key_dim, shape.value_dim, query.device)
        if reason and self.config.prefill != "auto":
            raise ValueError(
                f"prefill={self.config.prefill!r} cannot run on this model: {reason}; use 'dense' or 'auto'"
            )
        return reason or ""


@dataclass
class PrefillCounts:
    """What prefill has read in one layer; adds up until it is replaced.

    n_read, n_visible: keys read, and keys there were, over query heads and tokens; n_read is None once patterns of
    given sizes were at work, whose keys nobody counts. kinds: patterns of heads, by chunk.
    """

    n_read: float | None = 0.0
    n_visible: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    def add_exact(self, n_heads: int, n_new: int, length: int) -> None:
        """Count a chunk whose last token is the `length`-th."""
        self.kinds["dense"] += n_heads
        self._add(n_new, length, [1.0] * n_heads)

    def add_chosen(self, choices: Sequence[HeadChoice], n_new: int, length: int) -> None:
        """Count a chunk whose heads have chosen their patterns."""
        self.kinds.update(choice.kind for choice in choices)
        self._add(n_new, length, [choice.density for choice in choices])

    def add_given(self, patterns: Sequence[HeadPattern]) -> None:
        """Count a chunk whose heads had patterns of given sizes."""
        self.kinds.update(pattern.kind for pattern in patterns)
        self.n_read = None

    def _add(self, n_new: int, length: int, densities: Sequence[float]) -> None:
        visible = n_new * (length - (n_new - 1) / 2)
        self.n_visible += visible * len(densities)
        if self.n_read is not None:
            self.n_read += visible * sum(densities)
