"""Samples the prefill queries that teach the index."""

import copy

import torch
from torch import Tensor

RECENT_QUERIES = 256


class QuerySample:
    """Prefill queries kept for the index build: an even sample over the prompt, and the most recent ones.

    Kept are the tokens whose number is a multiple of a stride, which doubles when twice `size` are kept, and the last
    256. What is kept depends on how many tokens came, never on how they were cut into chunks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._stride = 1
        self._n_spread = 0
        self._recent_start = 0
        self._length = 0
        self._spread: Tensor | None = None  # (2 * size, H, D): row i is token i * stride
        self._recent: Tensor | None = None  # (256, H, D): row p % 256 is token p

    @property
    def length(self) -> int:
        """Tokens whose queries came by."""
        return self._length

    def add(self, queries: Tensor) -> None:
        """queries (1, H, n, D) of the next n tokens; the kept ones are copied to CPU memory."""
        if self._spread is None or self._recent is None:
            heads, dim = queries.shape[1], queries.shape[3]
            self._spread = torch.empty((2 * self._size, heads, dim), dtype=queries.dtype)
            self._recent = torch.empty((RECENT_QUERIES, heads, dim), dtype=queries.dtype)
        start, self._length = self._length, self._length + queries.shape[2]
        rows = queries[0].detach().transpose(0, 1)
        self._add_recent(rows, start, self._recent)
        self._add_spread(rows, start, self._spread)

    def _add_recent(self, rows: Tensor, start: int, ring: Tensor) -> None:
        first = max(start, self._length - RECENT_QUERIES)
        slots = [token % RECENT_QUERIES for token in range(first, self._length)]
        ring[slots] = rows[first - start :].to(ring.device)
        self._recent_start = max(self._recent_start, self._length - RECENT_QUERIES)

    def _add_spread(self, rows: Tensor, start: int, kept: Tensor) -> None:
        while (token := self._n_spread * self._stride) < self._length:
            room = kept.shape[0] - self._n_spread
            new = rows[token - start :: self._stride][:room].to(kept.device)
            kept[self._n_spread : self._n_spread + len(new)] = new
            self._n_spread += len(new)
            if self._n_spread == kept.shape[0]:
                kept[: self._size] = kept[::2].clone()
                self._n_spread, self._stride = self._size, 2 * self._stride

    def crop(self, length: int) -> None:
        """Forget the queries of tokens from `length` on."""
        self._n_spread = min(self._n_spread, -(-length // self._stride))
        self._recent_start = min(self._recent_start, length)
        # Last: as long as it says more, a crop that was interrupted is repeated.
        self._length = min(self._length, length)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors, for `restore`."""
        assert self._spread is not None
        assert self._recent is not None
        counts = torch.tensor([self._size, self._stride, self._n_spread, self._recent_start, self._length])
        return {
            "sample_spread": self._spread[: self._n_spread],
            "sample_recent": self._recent,
            "sample_counts": counts,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Become the sample whose `state` this is."""
        counts = state["sample_counts"].tolist()
        self._size, self._stride, self._n_spread, self._recent_start, self._length = counts
        spread, self._recent = state["sample_spread"], state["sample_recent"].clone()
        self._spread = torch.empty((2 * self._size, *spread.shape[1:]), dtype=spread.dtype)
        self._spread[: self._n_spread] = spread

    def copy(self) -> "QuerySample":
        """An independent copy."""
        twin = copy.copy(self)
        twin._spread, twin._recent = (None if x is None else x.clone() for x in (self._spread, self._recent))
        return twin

    def queries(self) -> Tensor:
        """(H, n, D) in token order, each token once."""
        assert self._spread is not None
        assert self._recent is not None
        n_spread = min(self._n_spread, -(-self._recent_start // self._stride))
        slots = [token % RECENT_QUERIES for token in range(self._recent_start, self._length)]
        return torch.cat([self._spread[:n_spread], self._recent[slots]]).transpose(0, 1)
