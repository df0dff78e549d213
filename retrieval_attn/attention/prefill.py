"""Attention of a chunk of new tokens over everything before it: exact, or sparse as the config says."""

import functools
import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.attention.to_device import earlier, heads_at_once, tokens_on_device, whole_heads
from retrieval_attn.config import DENSE_BELOW, FEWEST_SPARSE, RetrievalConfig
from retrieval_attn.kernels import AttentionState, HeadPattern, attend_adaptive, attend_dense, attend_patterns, merge
from retrieval_attn.kernels.sparse.choose import Choice
from retrieval_attn.kernels.sparse.lists import why_not_sparse
from retrieval_attn.kernels.sparse.patterns import DEFAULT_SIZES
from retrieval_attn.kv.device_prefix import DevicePrefix

log = logging.getLogger("retrieval_attn")

# Tokens at the end of a prompt that are exact; the question stands there.
EXACT_TAIL = 256

# Chunks for which a layer that had no sparse head is not asked again, at most.
LONGEST_REST = 8


class PrefillPolicy:
    """How one layer attends to a prompt, chunk by chunk, and what that came to.

    n_read, n_visible: keys read, and keys there were, over query heads and tokens; n_read is None once patterns of
    given sizes were at work, whose keys nobody counts. kinds: patterns of heads, by chunk.
    """

    def __init__(self, config: RetrievalConfig, patterns: Sequence[HeadPattern] = ()) -> None:
        self.config = config
        self.patterns = patterns
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.n_read: float | None = 0.0
        self.n_visible = 0.0
        self.kinds: Counter[str] = Counter()

    def wants_sparse(self, query: Tensor, memory: LayerMemory) -> bool:
        """Whether the chunk with these queries (1, H, T, D), the next ones of `memory`, is to be sparse."""
        config, T = self.config, query.shape[2]
        if config.prefill == "dense" or T < FEWEST_SPARSE:
            return False
        shape = memory.shape
        if reason := why_not_sparse((query.dtype, shape.dtype), shape.key_dim, shape.value_dim, query.device):
            if config.prefill != "auto":
                raise ValueError(
                    f"prefill={config.prefill!r} cannot run on this model: {reason}; use 'dense' or 'auto'"
                )
            _say_dense(reason)
            return False
        if config.prefill != "auto":
            return True
        least = DENSE_BELOW if config.dense_below is None else config.dense_below
        if memory.length + T < least:
            return False
        memory.rest -= 1
        return memory.rest < 0

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, memory: LayerMemory) -> AttentionState:
        """Sparse causal attention of the newest tokens, which are in `memory` already; shapes as in `prefill`.

        As many KV heads at a time as the device has room for: a pattern may name any key.
        """
        G, T = keys.shape[1:3]
        R, n = query.shape[1] // G, heads_at_once(memory, memory.length, query.device)
        states, choices = [], []
        for first in range(0, G, n):
            heads, asking = slice(first, min(first + n, G)), slice(first * R, min(first + n, G) * R)
            whole = whole_heads(memory, keys, values, heads)
            if self.config.prefill == "auto":
                state, chosen = attend_adaptive(query[:, asking], *whole, scale, self.config.prefill_mass)
                choices += chosen
            else:
                sizes = self.patterns or [DEFAULT_SIZES[self.config.prefill]] * query.shape[1]
                self.kinds.update(pattern.kind for pattern in sizes[asking])
                self.n_read = None
                state = attend_patterns(query[:, asking], *whole, scale, sizes[asking])
            states.append(state)
        if choices:
            self._note(choices, T, memory)
        outs, lses = zip(*states, strict=True)
        return AttentionState(torch.cat(outs, dim=1), torch.cat(lses, dim=1))

    def _note(self, choices: Sequence[Choice], T: int, memory: LayerMemory) -> None:
        self.kinds.update(choice.kind for choice in choices)
        self._count(T, memory.length, [choice.density for choice in choices])
        # Asking costs up to a fifth of dense attention, and a layer that has no use for it mostly stays so.
        if all(choice.kind == "dense" for choice in choices):
            memory.rest, memory.next_rest = memory.next_rest, min(LONGEST_REST, 2 * memory.next_rest)
        else:
            memory.next_rest = 1

    def note_dense(self, query: Tensor, memory: LayerMemory) -> None:
        """Count a chunk that was exact."""
        H, T = query.shape[1:3]
        self.kinds["dense"] += H
        self._count(T, memory.length, [1.0] * H)

    def _count(self, T: int, S: int, densities: list[float]) -> None:
        visible = T * (S - (T - 1) / 2)
        self.n_visible += visible * len(densities)
        if self.n_read is not None:
            self.n_read += visible * sum(densities)


@functools.cache
def _say_dense(reason: str) -> None:
    """Once for each reason."""
    log.warning("prefill is dense, which is slower for long prompts: sparse attention cannot run, %s", reason)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float, policy: PrefillPolicy
) -> AttentionState:
    """Attend causally, exactly or as `policy` says, and remember the chunk.

    query (1, H, T, D), keys (1, G, T, D), values (1, G, T, Dv) of the T tokens after those in `memory`, on the model's
    device. Returns (1, H, T, Dv) and (1, H, T).
    """
    start = memory.length
    if start == 0:
        memory.device_prefix = DevicePrefix(tokens_on_device(memory.config, memory, query.device))
    if policy.wants_sparse(query, memory):
        memory.append(query, keys, values)
        state = policy.attend(query, keys, values, scale, memory)
    else:
        state = _attend_exactly(query, keys, values, memory, scale)
        memory.append(query, keys, values)
        policy.note_dense(query, memory)
    memory.device_prefix.append(start, keys, values)
    return state


def _attend_exactly(query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float) -> AttentionState:
    """Earlier keys come in tiles and are merged, so the device holds no more than two of them beside its budget."""
    state = attend_dense(query, keys, values, scale, causal=True)
    for tile_keys, tile_values in earlier(memory, query.device):
        state = merge(state, attend_dense(query, tile_keys, tile_values, scale))
    return state
