"""StreamingLLM as a cache (arXiv 2309.17453): sinks and a window are kept, everything between is dropped for good.

The rival that cannot pass a retrieval test: a benchmark in which it does well proves nothing about finding keys. Keys
keep the positions they were read at, as in SCBench.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from retrieval_attn.hf.versions import query_length


class StreamingLayer(DynamicLayer):
    """A cache layer that forgets all but the first `n_sink` and the last `n_local` tokens after each forward pass.

    The tokens of one pass still see each other, and what was kept before them.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, n_sink: int, n_local: int) -> None:
        super().__init__()
        self.n_sink, self.n_local = n_sink, n_local
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns what was kept and the new tokens, (B, G, kept + n, D); keeps what StreamingLLM keeps of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, key_states], dim=2) if self.keys.numel() else key_states
        values = torch.cat([self.values, value_states], dim=2) if self.values.numel() else value_states
        self.seen += key_states.shape[2]
        self.keys, self.values = self._kept(keys), self._kept(values)
        return keys, values

    def _kept(self, rows: Tensor) -> Tensor:
        n = rows.shape[2]
        if n <= self.n_sink + self.n_local:
            return rows
        return torch.cat([rows[:, :, : self.n_sink], rows[:, :, n - self.n_local :]], dim=2)

    def get_seq_length(self) -> int:
        """Tokens seen, the forgotten ones included: positions go on from here."""
        return self.seen

    def get_mask_sizes(self, query_length_or_positions: Any) -> tuple[int, int]:
        """Keys of the next pass and the position of the first; what is missing lies before all new tokens."""
        kept = self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0
        return kept + query_length(query_length_or_positions), self.seen - kept

    def crop(self, tokens: int) -> None:
        """Nothing comes back once it is forgotten. Raises ValueError, unless nothing is to go."""
        if tokens:
            raise ValueError("a streaming cache cannot go back: what left its window is gone; copy it instead")
