"""Keys and values of one layer in CPU memory, in the model's dtype, growing in place."""

import mmap
import sys
import threading
from typing import NamedTuple

import torch
from torch import Tensor

# Linux flag: address space now, memory when touched. Reserving a model's whole context then costs nothing.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class _Transfer(NamedTuple):
    """A device-to-host copy under way: pinned staging memory and the event that ends it."""

    start: int
    keys: Tensor
    values: Tensor
    done: "torch.cuda.Event"


class HostStore:
    """Keys and values of all tokens of one sequence in one layer: two (G, capacity, D) arrays in CPU memory.

    Memory is reserved as address space and becomes real as tokens arrive, so appending never copies what is there (only
    outgrowing `capacity` does, once per doubling). 16-bit dtypes stay 2 bytes. From a CUDA device, appended rows travel
    through pinned memory asynchronously; any read waits for them.

    One thread may append or crop while others read rows below the length they were told.
    """

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._keys = _reserve(kv_heads, capacity, key_dim, dtype)
        self._values = _reserve(kv_heads, capacity, value_dim, dtype)
        self._transfers: list[_Transfer] = []
        self._transferring = threading.Lock()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens. keys (G, n, D), values (G, n, Dv), any device, the store's dtype."""
        start, stop = self.length, self.length + keys.shape[1]
        if stop > self.capacity:
            self._grow(max(stop, 2 * self.capacity))
        if keys.device.type == "cuda":
            with self._transferring:
                self._transfers.append(_start_transfer(start, keys, values))
        else:
            self._write(start, keys, values)
        self.length = stop

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view (G, stop - start, D) of the stored keys; valid until the store outgrows its capacity."""
        self._finish_transfers()
        return self._keys[:, start : self.length if stop is None else stop]

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view (G, stop - start, Dv) of the stored values; valid until the store outgrows its capacity."""
        self._finish_transfers()
        return self._values[:, start : self.length if stop is None else stop]

    def crop(self, length: int) -> None:
        """Forget every token from `length` on."""
        self._finish_transfers()
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tokens occupy."""
        per_token = self._keys[:, 0].numel() + self._values[:, 0].numel()
        return self.length * per_token * self._keys.element_size()

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        stop = start + keys.shape[1]
        self._keys[:, start:stop].copy_(keys)
        self._values[:, start:stop].copy_(values)

    def _finish_transfers(self) -> None:
        # The builder's thread reads too: each transfer is written once, and nobody reads before it is.
        with self._transferring:
            for transfer in self._transfers:
                transfer.done.synchronize()
                self._write(transfer.start, transfer.keys, transfer.values)
            self._transfers.clear()

    def _grow(self, capacity: int) -> None:
        self._finish_transfers()
        old = self._keys, self._values
        for name, tensor in zip(("_keys", "_values"), old, strict=True):
            grown = _reserve(tensor.shape[0], capacity, tensor.shape[2], tensor.dtype)
            grown[:, : self.length].copy_(tensor[:, : self.length])
            setattr(self, name, grown)
        self.capacity = capacity


def _reserve(heads: int, capacity: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(heads, capacity, dim) of untouched CPU memory; large pages where the system offers them."""
    n_bytes = max(1, heads * capacity * dim) * dtype.itemsize
    try:
        buffer = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError) as error:
        raise MemoryError(
            f"cannot reserve {n_bytes / 2**30:.2f} GiB of address space for {capacity} tokens ({error}); "
            "lower the process limit (ulimit -v) or use a shorter context"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Retrieved rows lie far apart: with 4 KiB pages every one of them would miss the TLB.
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype, count=heads * capacity * dim).view(heads, capacity, dim)


def _start_transfer(start: int, keys: Tensor, values: Tensor) -> _Transfer:
    staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (keys, values)]
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(keys.device))
    return _Transfer(start, staged[0], staged[1], done)
