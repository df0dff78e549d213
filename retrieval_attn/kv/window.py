"""The near window keeps the first `n_sink` and the last `n_local` tokens on the device."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Which tokens of a context of a given length are near and which are far, as half-open ranges of token numbers.

    Token numbers count tokens, not position ids: gaps and padding do not move them. near is [0, sink_stop) and
    [far_stop, length); far is [sink_stop, far_stop). Together they hold every token exactly once.
    """

    sink_stop: int
    far_stop: int
    length: int

    @property
    def n_far(self) -> int:
        return self.far_stop - self.sink_stop


def split(length: int, n_sink: int, n_local: int) -> Split:
    """Divide a context of `length` tokens; the window wins when they overlap, so short contexts are all near."""
    sink_stop = min(n_sink, length)
    return Split(sink_stop, max(sink_stop, length - n_local), length)


class Window:
    """Keys and values of the near tokens of one sequence in one layer, on the device, in one contiguous piece.

    Sinks lie first, the local tokens follow in a ring: attention does not ask for order, so a step overwrites one row
    and moves nothing. Slot of token p: p for a sink, n_sink + (p - n_sink) mod n_local otherwise.
    """

    def __init__(self, n_sink: int, n_local: int) -> None:
        self._n_sink = n_sink
        self._n_local = n_local
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens; keys (1, G, n, D), values (1, G, n, Dv). Older local tokens make room."""
        if self._keys is None or self._values is None:
            self._keys, self._values = self._allocate(keys), self._allocate(values)
        start, n = self.length, keys.shape[2]
        self.length += n
        if n == 1:
            slot = self._slot(start)
            self._keys[:, :, slot] = keys[:, :, 0]
            self._values[:, :, slot] = values[:, :, 0]
            return
        tokens = [p for p in range(start, start + n) if p < self._n_sink or p >= self.length - self._n_local]
        if tokens:
            self.write(tokens, keys[:, :, tokens[0] - start :], values[:, :, tokens[0] - start :], tokens[0])

    def write(self, tokens: list[int], keys: Tensor, values: Tensor, first: int) -> None:
        """Put the named tokens into their slots; row i of keys and values belongs to token `first + i`."""
        assert self._keys is not None
        assert self._values is not None
        slots = torch.tensor([self._slot(p) for p in tokens], device=keys.device)
        rows = torch.tensor([p - first for p in tokens], device=keys.device)
        self._keys.index_copy_(2, slots, keys.index_select(2, rows))
        self._values.index_copy_(2, slots, values.index_select(2, rows))

    def crop(self, length: int, read: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        """Go back to `length` tokens; the ring is refilled from what `read(start, stop)` gives: stored keys and values
        (G, n, D) of those tokens."""
        if length >= self.length:
            return
        old_start = max(self._n_sink, self.length - self._n_local)
        new_start = max(self._n_sink, length - self._n_local)
        returning = list(range(new_start, min(old_start, length)))
        self.length = length
        if returning and self._keys is not None:
            keys, values = read(new_start, new_start + len(returning))
            device = self._keys.device
            self.write(returning, keys[None].to(device), values[None].to(device), new_start)

    def refill(self, length: int, device: torch.device, read: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        """Become, empty so far, the window over `length` tokens; `read` as in `crop`."""
        local = max(min(self._n_sink, length), length - self._n_local)
        parts = zip(read(0, min(self._n_sink, length)), read(local, length), strict=True)
        keys, values = (torch.cat(pair, dim=1)[None].to(device) for pair in parts)
        self._keys, self._values = self._allocate(keys), self._allocate(values)
        self.length = length
        tokens = [*range(min(self._n_sink, length)), *range(local, length)]
        slots = torch.tensor([self._slot(p) for p in tokens], device=device)
        self._keys.index_copy_(2, slots, keys)
        self._values.index_copy_(2, slots, values)

    @property
    def device(self) -> torch.device:
        """Where the near tokens lie; the CPU as long as there are none."""
        return torch.device("cpu") if self._keys is None else self._keys.device

    def copy(self) -> "Window":
        """An independent copy."""
        twin = copy.copy(self)
        twin._keys, twin._values = (None if x is None else x.clone() for x in (self._keys, self._values))
        return twin

    def keys(self) -> Tensor:
        """(1, G, W, D), the near keys in no particular order; a view."""
        assert self._keys is not None
        return self._keys[:, :, : min(self.length, self._keys.shape[2])]

    def values(self) -> Tensor:
        """(1, G, W, Dv), in the order of `keys`; a view."""
        assert self._values is not None
        return self._values[:, :, : min(self.length, self._values.shape[2])]

    def state(self) -> dict[str, Tensor]:
        """Everything but the length, as tensors, for `restore`."""
        return {"window_keys": self.keys(), "window_values": self.values()}

    def restore(self, length: int, state: dict[str, Tensor], device: torch.device) -> None:
        """Become the window over `length` tokens whose `state` this is. Raises ValueError if it is of other sizes."""
        kept = []
        for rows in (state["window_keys"], state["window_values"]):
            if rows.shape[2] != min(length, self._n_sink + self._n_local):
                raise ValueError(f"the window must hold the near ones of {length} tokens, got {rows.shape[2]}")
            whole = self._allocate(rows.to(device))
            whole[:, :, : rows.shape[2]] = rows
            kept.append(whole)
        self._keys, self._values = kept
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(x.nbytes for x in (self._keys, self._values) if x is not None)

    def _slot(self, token: int) -> int:
        return token if token < self._n_sink else self._n_sink + (token - self._n_sink) % self._n_local

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty((1, like.shape[1], self._n_sink + self._n_local, like.shape[3]))
