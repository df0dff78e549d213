"""One full-attention layer of transformers' cache, whose tokens live in `LayerMemory`."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from retrieval_attn.attention.decode import StepClock, decode, decode_block
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.attention.prefill import prefill
from retrieval_attn.attention.prefill_policy import PrefillCounts, PrefillPolicy
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.far_index import Submit
from retrieval_attn.hf.versions import query_length
from retrieval_attn.kernels import AttentionState
from retrieval_attn.kv.host_store import Extent


class RetrievalLayer(DynamicLayer):
    """A full-attention cache layer whose tokens live in `LayerMemory`, one per sequence of the batch."""

    def __init__(
        self, config: RetrievalConfig, capacity: int, n_layers: int = 1, policy: PrefillPolicy | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.policy = policy or PrefillPolicy(config)
        self.prefilled = PrefillCounts()
        self.n_layers = n_layers
        self.memories: list[LayerMemory] = []
        self.clock = StepClock()
        self.phase = "auto"
        self.before_decode: Callable[[], None] = lambda: None
        self.submit: Submit | None = None
        self._capacity = capacity
        self._seen = 0  # tokens per row, padding included, as transformers counts them
        self._padding: Tensor | None = None  # (B, seen) bool, True = token; None while no row has padding
        self._awaiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """One memory per sequence."""
        values = key_states if value_states is None else value_states
        B, G, _, D = key_states.shape
        shape = MemoryShape(G, D, values.shape[3], key_states.dtype, self._capacity, self.n_layers, B)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.memories = [LayerMemory(self.config, shape) for _ in range(B)]
        for memory in self.memories:
            memory.far_index.submit = self.submit
        self.is_initialized = True

    def adopt(
        self, keys: Extent, values: Extent, n_tokens: int, state: dict[str, Tensor], device: torch.device
    ) -> None:
        """Become a layer of one sequence whose tokens a file holds; called on an empty, initialised layer."""
        self.memories[0].adopt(keys, values, n_tokens, state, device)
        self._seen = n_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values, the keys with a handle on this layer; they are stored by `attend`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._awaiting:
            raise ValueError(
                "the keys of the last forward pass were never attended to: the model must be loaded with "
                "attn_implementation='retrieval' (after an interrupted pass, call settle() on the cache first)"
            )
        if key_states.shape[0] != len(self.memories):
            raise ValueError(f"the cache holds a batch of {len(self.memories)}, got a batch of {key_states.shape[0]}")
        self._awaiting = True
        key_states = key_states.view_as(key_states)
        key_states._ra_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> AttentionState:
        """Store the new tokens and attend: exactly for several tokens, through the index for a single one."""
        if not self._awaiting:
            raise ValueError("two layers share one layer's keys and values (as in Gemma-3n), which is not supported")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"only (batch, tokens) padding masks are supported, got a mask of shape {list(mask.shape)}"
            )
        self._awaiting = False
        valid = self._note_padding(mask, len(self.memories), keys.shape[2])
        if valid is None and len(self.memories) == 1:
            state = self._attend_one(self.memories[0], query, keys, values, scale)
        else:
            state = self._attend_rows(query, keys, values, valid, scale)
        self._seen += keys.shape[2]
        return state

    def _attend_one(
        self, memory: LayerMemory, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> AttentionState:
        memory.scale = scale
        single = query.shape[2] == 1
        if self.phase == "prefill" or (self.phase == "auto" and not single) or memory.length == 0:
            memory.forget_step()
            return prefill(query, keys, values, memory, scale, self.policy, self.prefilled)
        if self.phase == "retrieve":
            memory.forget_step()
        if single:
            memory.append(query, keys, values)
        if memory.wants_build():
            self.before_decode()
        if single:
            return decode(query, memory, scale, self.clock)
        return decode_block(query, keys, values, memory, scale, self.clock)

    def _attend_rows(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scale: float
    ) -> AttentionState:
        """Sequence by sequence, padding left out; rows of padding give the empty state."""
        n_batch, n_heads, n_new = query.shape[:3]
        out = query.new_zeros((n_batch, n_heads, n_new, values.shape[3]))
        lse = torch.full((n_batch, n_heads, n_new), -torch.inf, device=query.device)
        for b, memory in enumerate(self.memories):
            rows = torch.arange(n_new, device=query.device) if valid is None else valid[b].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            parts = [x[b : b + 1].index_select(2, rows) for x in (query, keys, values)]
            state = self._attend_one(memory, parts[0], parts[1], parts[2], scale)
            out[b].index_copy_(1, rows, state.out[0])
            lse[b].index_copy_(1, rows, state.lse[0])
        return AttentionState(out, lse)

    def _note_padding(self, mask: Tensor | None, n_batch: int, n_new: int) -> Tensor | None:
        """Remember which of the new tokens are padding; None if none of all tokens is."""
        if mask is None and self._padding is None:
            return None
        new = torch.ones((n_batch, n_new), dtype=torch.bool) if mask is None else mask[:, -n_new:].bool()
        if self._padding is None:
            self._padding = torch.ones((n_batch, self._seen), dtype=torch.bool, device=new.device)
        self._padding = torch.cat([self._padding, new.to(self._padding.device)], dim=1)
        return new

    def get_seq_length(self) -> int:
        """Tokens per row, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length_or_positions: Any) -> tuple[int, int]:
        """Length and offset of the mask that transformers should describe."""
        return self._seen + query_length(query_length_or_positions), 0

    def crop(self, tokens: int) -> None:
        """Drop the last `-tokens` tokens; a positive number is the length to keep (transformers before 5.20)."""
        keep = min(self._seen, tokens if tokens > 0 else self._seen + tokens)
        if keep < 0:
            raise ValueError(f"cannot drop {-tokens} tokens, the cache holds {self._seen}")
        self.keep(keep)

    def keep(self, n_tokens: int) -> None:
        """Go back to the first `n_tokens` of each row, whatever an interrupted pass left behind; may be repeated."""
        # First what `settle` goes by: interrupted after this, it asks for the same again.
        self._seen, self._awaiting = n_tokens, False
        if self._padding is not None:
            self._padding = self._padding[:, :n_tokens]
        for b, memory in enumerate(self.memories):
            memory.crop(n_tokens if self._padding is None else int(self._padding[b].sum()))

    def reset(self) -> None:
        """Forget everything."""
        self.memories, self._seen, self._padding, self._awaiting = [], 0, None, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row i from what was row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.memories)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows; a row named twice is forked."""
        chosen = indices.tolist() if indices.dtype != torch.bool else indices.nonzero()[:, 0].tolist()
        first_use = {old: new for new, old in reversed(list(enumerate(chosen)))}
        self.memories = [
            self.memories[old] if first_use[old] == new else self.memories[old].fork() for new, old in enumerate(chosen)
        ]
        for memory in self.memories:
            memory.shape = memory.shape._replace(n_sequences=len(chosen))
        if self._padding is not None:
            self._padding = self._padding[chosen]

    def fork(self, config: RetrievalConfig | None = None) -> "RetrievalLayer":
        """An independent layer with the same tokens; what neither changes is held once. config: its own options."""
        twin = copy.copy(self)
        twin.config = config or self.config
        twin.memories = [memory.fork(config) for memory in self.memories]
        twin.policy = PrefillPolicy(twin.config, self.policy.patterns)
        twin.prefilled, twin.clock = PrefillCounts(), StepClock()
        return twin

    def offload(self) -> None:
        """Nothing to do: tokens are in CPU memory already."""

    def prefetch(self) -> None:
        """Nothing to do: only what is retrieved goes to the device."""


def layer_of(keys: Tensor) -> RetrievalLayer | None:
    """The layer whose `update` returned these keys; None for keys that came from elsewhere."""
    return getattr(keys, "_ra_layer", None)
