"""Brings a layer's earlier keys and values to the device for prefill, within a budget.

The first tokens may stay on the device; the others come back from the host store tile by tile, through pinned memory
and on a stream of their own, so that one tile is copied while attention works on the one before.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.kv.host_store import HostStore

# Device memory that is left when the budget is not given: to what the allocator cannot use and to sparse attention's
# estimates; and for every token of a chunk to activations, at the widest place of a layer of a 70B model.
_RESERVE, _RESERVE_PER_TOKEN = 1 << 30, 1 << 18

Span = tuple[int, int]


def reserve(config: RetrievalConfig) -> int:
    """Bytes of the device that are left free when the budget is not given."""
    return _RESERVE + config.prefill_chunk * _RESERVE_PER_TOKEN


def tokens_on_device(config: RetrievalConfig, memory: LayerMemory, device: torch.device) -> int:
    """How many tokens of one sequence and layer may stay on the device; without a GPU none, for memory is one."""
    if device.type != "cuda":
        return 0
    shape, budget = memory.shape, config.device_kv_budget
    row = shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
    if budget is None:
        free, _ = torch.cuda.mem_get_info(device)
        budget = max(0, free - reserve(config) - 2 * config.prefill_tile * row)
    return budget // (row * shape.n_layers * shape.n_sequences)


def earlier(memory: LayerMemory, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All tokens of a memory, in tiles of at most `prefill_tile`: keys (1, G, n, D), values (1, G, n, Dv) on `device`.

    A tile is valid until the next one is asked for.
    """
    size, resident = memory.config.prefill_tile, memory.device_prefix
    yield from resident.tiles(size)
    spans = [(start, min(memory.length, start + size)) for start in range(resident.length, memory.length, size)]
    if device.type == "cpu":
        for span in spans:
            keys, values = memory.store.read(*span)
            yield keys[None], values[None]
    else:
        yield from _brought(memory.store, spans, device)


def heads_at_once(memory: LayerMemory, n_tokens: int, device: torch.device) -> int:
    """KV heads whose `n_tokens` keys and values take no more of the device than two tiles do; at least one. All of them
    where `whole_heads` gives views."""
    G = memory.shape.kv_heads
    if device.type == "cpu" and memory.config.kv_dtype != "int8":
        return G
    return max(1, min(G, 2 * memory.config.prefill_tile * G // max(1, n_tokens)))


def whole_heads(memory: LayerMemory, keys: Tensor, values: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    """All keys (1, G', S, D) and values (1, G', S, Dv) of some KV heads, on the device of the newest ones.

    keys (1, G, T, D), values: of the newest tokens, which are in the memory already. On a CPU these are views of the
    store, unless it holds int8.
    """
    store, resident, past = memory.store, memory.device_prefix, memory.length - keys.shape[2]
    if keys.device.type == "cpu":
        stored = store.read(0, memory.length, heads)
        return stored[0][None], stored[1][None]
    there = [new.new_empty((1, new[0, heads].shape[0], memory.length, new.shape[3])) for new in (keys, values)]
    for whole, new in zip(there, (keys, values), strict=True):
        whole[:, :, past:] = new[:, heads]
    at = 0
    for tile in resident.tiles(memory.config.prefill_tile):
        for whole, part in zip(there, tile, strict=True):
            whole[:, :, at : at + part.shape[2]] = part[:, heads]
        at += tile[0].shape[2]
    for start in range(at, past, memory.config.prefill_tile):
        stop = min(past, start + memory.config.prefill_tile)
        for whole, part in zip(there, store.read(start, stop, heads), strict=True):
            whole[0, :, start:stop].copy_(part, non_blocking=True)
    return there[0], there[1]


class _Lane:
    """One of two buffers: pinned memory, and the place on the device that it is copied to."""

    def __init__(self, device: torch.device, copies: "torch.cuda.Stream") -> None:
        self._device, self._copies = device, copies
        self._arrived, self._done = torch.cuda.Event(), torch.cuda.Event()
        self._pinned: list[Tensor] = []
        self._there: list[Tensor] = []

    def fetch(self, store: HostStore, span: Span) -> None:
        """Begin to copy tokens to the device, once what was here before is no longer in use."""
        parts = [part[None] for part in store.read(*span)]
        if not self._pinned:
            self._pinned = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]
            self._there = [torch.empty(part.shape, dtype=part.dtype, device=self._device) for part in parts]
            # The place may have been another tensor's, whose last reader is still waiting for its turn.
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        # The pinned memory is free when its last copy has arrived, the place on the device when attention is done.
        self._arrived.synchronize()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._done)
            for pinned, there, part in zip(self._pinned, self._there, parts, strict=True):
                n = part.shape[2]
                pinned[:, :, :n].copy_(part)
                there[:, :, :n].copy_(pinned[:, :, :n], non_blocking=True)
            self._arrived.record(self._copies)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """The n tokens on the device; what is launched from now on waits for them."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        keys, values = (there[:, :, :n] for there in self._there)
        return keys, values

    def release(self) -> None:
        """What was launched until now is the last that needs the tokens."""
        self._done.record(torch.cuda.current_stream(self._device))


def _brought(store: HostStore, spans: Sequence[Span], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    if not spans:
        return
    copies = torch.cuda.Stream(device)
    lanes = (_Lane(device, copies), _Lane(device, copies))
    try:
        lanes[0].fetch(store, spans[0])
        for i, (start, stop) in enumerate(spans):
            if i + 1 < len(spans):
                lanes[(i + 1) % 2].fetch(store, spans[i + 1])
            yield lanes[i % 2].take(stop - start)
            lanes[i % 2].release()
    finally:
        # Also when given up half-way: nobody may use the buffers' memory before the copies into it are done.
        torch.cuda.current_stream(device).wait_stream(copies)
