"""Attention of a chunk of new tokens over everything before it: exact, or sparse as the policy decides."""

import functools
import logging
from collections.abc import Sequence

from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.attention.prefill_policy import ChunkPlan, PrefillCounts, PrefillPolicy
from retrieval_attn.attention.to_device import earlier, whole_heads
from retrieval_attn.kernels import AttentionState, attend_adaptive, attend_dense, attend_patterns, merge
from retrieval_attn.kernels.sparse.choose import HeadChoice
from retrieval_attn.kv.device_prefix import DevicePrefix

log = logging.getLogger("retrieval_attn")


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    memory: LayerMemory,
    scale: float,
    policy: PrefillPolicy,
    counts: PrefillCounts,
) -> AttentionState:
    """Attend causally, exactly or as `policy` decides, remember the chunk, and count in `counts` what was read.

    query (1, H, T, D), keys (1, G, T, D), values (1, G, T, Dv) of the T tokens after those in `memory`, on the model's
    device. Returns (1, H, T, Dv) and (1, H, T).
    """
    start, plan = memory.length, policy.decide(query, memory)
    if plan.n_on_device is not None:
        memory.device_prefix = DevicePrefix(plan.n_on_device)
    if plan.sparse:
        memory.append(query, keys, values)
        state, choices = _attend_sparsely(query, keys, values, memory, scale, plan, policy.config.prefill_mass)
    else:
        state, choices = _attend_exactly(query, keys, values, memory, scale), []
        memory.append(query, keys, values)
    _note(plan, choices, query, memory, counts)
    memory.device_prefix.append(start, keys, values)
    return state


def _attend_exactly(query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float) -> AttentionState:
    """Earlier keys come in tiles and are merged, so the device holds no more than two of them beside its budget."""
    state = attend_dense(query, keys, values, scale, causal=True)
    for tile_keys, tile_values in earlier(memory, query.device):
        state = merge(state, attend_dense(query, tile_keys, tile_values, scale))
    return state


def _attend_sparsely(
    query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float, plan: ChunkPlan, mass: float
) -> tuple[AttentionState, list[HeadChoice]]:
    """Attention of the newest tokens, which are in `memory` already, and what the heads that choose have chosen.

    As many KV heads at a time as the device has room for: a pattern may name any key.
    """
    G = keys.shape[1]
    R = query.shape[1] // G
    states: list[AttentionState] = []
    choices: list[HeadChoice] = []
    for first in range(0, G, plan.n_heads):
        heads = slice(first, min(first + plan.n_heads, G))
        asking = slice(heads.start * R, heads.stop * R)
        whole = whole_heads(memory, keys, values, heads)
        if plan.patterns is None:
            state, chosen = attend_adaptive(query[:, asking], *whole, scale, mass)
            choices += chosen
        else:
            state = attend_patterns(query[:, asking], *whole, scale, plan.patterns[asking])
        states.append(state)
    return AttentionState.beside(states, 1), choices


def _note(
    plan: ChunkPlan, choices: Sequence[HeadChoice], query: Tensor, memory: LayerMemory, counts: PrefillCounts
) -> None:
    """Count the chunk that was read, and remember whether asking its heads was of use."""
    n_heads, n_new = query.shape[1:3]
    if plan.hindrance:
        _say_dense(plan.hindrance)
    if not plan.sparse:
        counts.add_exact(n_heads, n_new, memory.length)
        memory.rest = memory.rest.shorter() if plan.rests else memory.rest
    elif plan.patterns is not None:
        counts.add_given(plan.patterns)
    else:
        counts.add_chosen(choices, n_new, memory.length)
        memory.rest = memory.rest.after(all(choice.kind == "dense" for choice in choices))


@functools.cache
def _say_dense(reason: str) -> None:
    """Once for each reason."""
    log.warning("prefill is dense, which is slower for long prompts: sparse attention cannot run, %s", reason)
