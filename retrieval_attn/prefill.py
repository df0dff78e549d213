"""Exact attention of a chunk of new tokens over everything before it, however much that is."""

from torch import Tensor

from retrieval_attn.kernels import AttentionState, attend_dense, merge
from retrieval_attn.memory import LayerMemory


def prefill(query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float) -> AttentionState:
    """Attend exactly, causally, and remember the chunk.

    query (1, H, T, D), keys (1, G, T, D), values (1, G, T, Dv) of the T tokens after those in `memory`, on the
    model's device. Earlier keys are read from CPU memory in tiles and merged, so the device never holds more than one
    tile of them. Returns (1, H, T, Dv) and (1, H, T).
    """
    state = attend_dense(query, keys, values, scale, causal=True)
    for start in range(0, memory.length, memory.config.prefill_tile):
        stop = min(memory.length, start + memory.config.prefill_tile)
        tile_keys = memory.store.keys(start, stop)[None].to(query.device, non_blocking=True)
        tile_values = memory.store.values(start, stop)[None].to(query.device, non_blocking=True)
        state = merge(state, attend_dense(query, tile_keys, tile_values, scale))
    memory.append(query, keys, values)
    return state
