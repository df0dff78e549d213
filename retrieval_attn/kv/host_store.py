"""Keys and values of one layer in CPU memory or on disk, in the model's dtype or as int8, growing in place."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kv.address_space import OpenFile
from retrieval_attn.kv.int8 import Scales
from retrieval_attn.kv.shared_rows import SharedRows

# Transfers under way at most; each holds pinned memory for as many tokens as were appended.
MOST_TRANSFERS = 2


class _Transfer(NamedTuple):
    """A device-to-host copy under way: pinned staging memory and the event that ends it."""

    start: int
    keys: Tensor
    values: Tensor
    done: "torch.cuda.Event"


class Extent(NamedTuple):
    """Where a file holds (G, n, D) rows: the byte they begin at."""

    file: OpenFile
    offset: int


class _Kept(NamedTuple):
    """Rows, and what their numbers stand for if they are int8; replaced as a whole, so that neither a reader in another
    thread nor an interruption meets half of it."""

    rows: SharedRows
    scales: Scales | None

    @property
    def tensor(self) -> Tensor:
        return self.rows.tensor

    def roomy(self, length: int, capacity: int, scales: Scales | None) -> "_Kept":
        """The first `length` rows with room for `capacity`, in new scales if they are others."""
        heads, _, dim = self.tensor.shape
        rows, old = SharedRows(heads, capacity, dim, self.tensor.dtype, self.rows.folder), self.tensor[:, :length]
        if scales is None or self.scales is None or scales is self.scales:
            rows.write(0, old)
            return _Kept(rows, self.scales)
        rows.ensure(length)
        scales.convert(old, self.scales, rows.tensor)
        return _Kept(rows, scales)

    def encoded(self, new: Tensor) -> Tensor:
        return new if self.scales is None else self.scales.encode(new)


class HostStore:
    """Keys and values of all tokens of one sequence in one layer: two (G, capacity, D) arrays in CPU memory.

    Memory is reserved as address space and becomes real as tokens arrive, so appending never copies what is there (only
    outgrowing `capacity` does, once per doubling). 16-bit dtypes stay 2 bytes. From a CUDA device, appended rows travel
    through pinned memory asynchronously; any read waits for them.

    As int8, `keys` and `values` give integers: search them with `folded` queries, and `unfolded` turns what attention
    makes of the integers into what it would make of the values. `read` gives both as they were.

    One thread may append or crop while others read rows below the length they were told.
    """

    def __init__(
        self,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        capacity: int,
        int8: bool = False,
        folder: Path | None = None,
    ) -> None:
        """folder: where the rows lie on disk; None: in memory. Raises MemoryError or OSError if neither can be had."""
        self.length = 0
        self.capacity = capacity
        self.dtype = dtype
        kept = torch.int8 if int8 else dtype
        self._keys, self._values = (
            _Kept(SharedRows(kv_heads, capacity, dim, kept, folder), Scales.least(kv_heads, dim) if int8 else None)
            for dim in (key_dim, value_dim)
        )
        self._transfers: list[_Transfer] = []
        self._transferring = threading.Lock()
        # Called before stored rows become others: then an index over them is of no use any more.
        self.before_rewrite: Callable[[], None] = _nobody

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens. keys (G, n, D), values (G, n, Dv), any device, the store's dtype.

        Raises OSError if they lie on a disk that is full, and holds the same tokens as before then.
        """
        start, stop = self.length, self.length + keys.shape[1]
        if stop > self.capacity:
            self._grow(max(stop, 2 * self.capacity))
        if self._keys.scales is not None:
            self._make_fit(keys, values)
            keys, values = self._keys.encoded(keys), self._values.encoded(values)
        if keys.device.type == "cuda":
            # Found out now, not when the rows arrive.
            self._keys.rows.ensure(stop)
            self._values.rows.ensure(stop)
            with self._transferring:
                self._transfers.append(_start_transfer(start, keys, values))
            self._finish_transfers(but=MOST_TRANSFERS)
        else:
            self._write(start, keys, values)
        self.length = stop

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view (G, stop - start, D) of the stored keys; valid until the store outgrows its capacity."""
        self._finish_transfers()
        return self._keys.tensor[:, start : self.length if stop is None else stop]

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view (G, stop - start, Dv) of the stored values; valid until the store outgrows its capacity."""
        self._finish_transfers()
        return self._values.tensor[:, start : self.length if stop is None else stop]

    def read(self, start: int, stop: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys (G', n, D) and values (G', n, Dv) of some KV heads in the model's dtype; views unless kept as int8."""
        keys, values = self.keys(start, stop)[heads], self.values(start, stop)[heads]
        if self._keys.scales is None or self._values.scales is None:
            return keys, values
        return self._keys.scales.decode(keys, self.dtype, heads), self._values.scales.decode(values, self.dtype, heads)

    def folded(self, query: Tensor) -> Tensor:
        """Queries (..., H, T, D) whose inner products with the stored keys are those with the keys themselves."""
        return query if self._keys.scales is None else self._keys.scales.times(query)

    def unfolded(self, out: Tensor) -> Tensor:
        """Weighted means (..., H, T, Dv) of stored values as means of the values themselves."""
        return out if self._values.scales is None else self._values.scales.times(out)

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        self._finish_transfers()
        self.length = min(self.length, length)
        for kept in (self._keys, self._values):
            kept.rows.forget(self.length)

    def fork(self) -> "HostStore":
        """A store of its own with the same tokens; what neither changes is held once."""
        self._finish_transfers()
        twin = copy.copy(self)
        twin._keys, twin._values = (
            kept._replace(rows=kept.rows.fork(self.length)) for kept in (self._keys, self._values)
        )
        twin._transfers, twin._transferring = [], threading.Lock()
        twin.before_rewrite = _nobody
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tokens occupy; forks count what they share, too."""
        return self.length * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value, over all heads."""
        per_token = self._keys.tensor[:, 0].numel() + self._values.tensor[:, 0].numel()
        return per_token * self._keys.tensor.element_size()

    def scales(self) -> dict[str, Tensor]:
        """The scales of int8, as tensors, for `adopt`; empty if the rows are in the model's dtype."""
        named = {"key_steps": self._keys.scales, "value_steps": self._values.scales}
        return {name: scales.steps for name, scales in named.items() if scales is not None}

    def adopt(self, keys: Extent, values: Extent, length: int, scales: dict[str, Tensor]) -> None:
        """Take the `length` tokens that a file holds, into an empty store, unread (`SharedRows.cover`).

        scales: as from `scales`. The file stays as it is, and must: what is written here goes to memory.
        """
        capacity, adopted = max(self.capacity, length), []
        for kept, extent, name in ((self._keys, keys, "key_steps"), (self._values, values, "value_steps")):
            heads, _, dim = kept.tensor.shape
            dtype = kept.tensor.dtype
            in_file = length * dim * dtype.itemsize
            rows = SharedRows(heads, capacity, dim, dtype, kept.rows.folder, in_file, extent.offset)
            rows.cover(extent.file, extent.offset, length)
            adopted.append(_Kept(rows, None if kept.scales is None else Scales(scales[name].clone())))
        self._keys, self._values = adopted
        self.capacity, self.length = capacity, length

    def _make_fit(self, keys: Tensor, values: Tensor) -> None:
        """Let scales grow to what is to be appended; the stored rows are then rounded anew."""
        self._finish_transfers()
        for name, new in (("_keys", keys), ("_values", values)):
            kept: _Kept = getattr(self, name)
            assert kept.scales is not None
            scales = kept.scales.grown(new)
            if scales is not None:
                if self.length:
                    self.before_rewrite()
                setattr(self, name, kept.roomy(self.length, self.capacity, scales))

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        self._keys.rows.write(start, keys)
        self._values.rows.write(start, values)

    def _finish_transfers(self, but: int = 0) -> None:
        """Wait for all transfers but the latest few."""
        # The builder's thread reads too: each transfer is written once, and nobody reads before it is.
        with self._transferring:
            while len(self._transfers) > but:
                transfer = self._transfers[0]
                transfer.done.synchronize()
                self._write(transfer.start, transfer.keys, transfer.values)
                del self._transfers[0]

    def _grow(self, capacity: int) -> None:
        self._finish_transfers()
        self._keys = self._keys.roomy(self.length, capacity, self._keys.scales)
        self._values = self._values.roomy(self.length, capacity, self._values.scales)
        self.capacity = capacity


def _nobody() -> None:
    """Stands in for a listener where there is none."""


def _start_transfer(start: int, keys: Tensor, values: Tensor) -> _Transfer:
    staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (keys, values)]
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(keys.device))
    return _Transfer(start, staged[0], staged[1], done)
