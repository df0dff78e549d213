"""Rows of keys or of values, one array for all KV heads of a layer, in pages that forks and files can share."""

import os
from pathlib import Path

import torch
from torch import Tensor

from retrieval_attn.kv.address_space import CAN_COVER, PAGE, AddressSpace, Cover, OpenFile

# Fewer rows than this that a fork does not share yet are copied; more are moved to where it can share them.
FEW = 4096

# Bytes of its own rows from which on a head is given huge pages, each as large as this.
HUGE_PAGE = 1 << 21


class SharedRows:
    """(G, capacity, D) of one dtype, of which the first rows are in use; room that is not takes no memory.

    tensor: all of it, (G, capacity, D), each row contiguous; valid as long as any view of it lives.
    """

    def __init__(
        self,
        heads: int,
        capacity: int,
        dim: int,
        dtype: torch.dtype,
        folder: Path | None = None,
        like: int = 0,
        skew: int = 0,
    ) -> None:
        """folder: where they lie on disk, or None. like, skew: for rows that a file is to cover, the bytes of one head
        in the file, and where in it the first head begins: pages of file and memory must begin alike."""
        self.folder = folder
        self._shared = 0  # leading rows that the covers hold as they are here
        self._row = dim * dtype.itemsize
        self._skew = skew % PAGE
        # Heads lie at least a page apart, so that no page holds rows of two of them.
        wanted = capacity * self._row + PAGE
        self._stride = -(-wanted // PAGE) * PAGE + like % PAGE
        self._pages = AddressSpace(self._skew + heads * self._stride, folder)
        flat = self._pages.tensor(dtype, self._skew)
        self.tensor = flat.as_strided((heads, capacity, dim), (self._stride // dtype.itemsize, dim, 1))

    def write(self, start: int, new: Tensor) -> None:
        """Put rows (G, n, D) at row `start`. Raises OSError if they lie on a disk that is full."""
        stop = start + new.shape[1]
        self.ensure(stop)
        self.tensor[:, start:stop].copy_(new)

    def ensure(self, length: int) -> None:
        """Make sure that `length` rows can be written; raises OSError if a disk is full."""
        for first in self._starts():
            self._pages.ensure(first, first + length * self._row)
        if (length - self._shared) * self._row > HUGE_PAGE:
            self._pages.prefer_huge_pages()

    def forget(self, length: int) -> None:
        """The rows from `length` on may be written anew."""
        if length < self._shared:
            self._shared = length
            self._pages.covers = self._covers(length)

    def cover(self, file: OpenFile, offset: int, length: int) -> None:
        """Let the first rows be those that a file holds as (G, length, D) from byte `offset` on, copy-on-write.

        Where files cannot cover memory they are read.
        """
        if not CAN_COVER:
            self._read(file, offset, length)
            return
        for head, first in enumerate(self._starts()):
            begin = offset + head * length * self._row
            at = first // PAGE * PAGE
            n_bytes = -(-(first + length * self._row) // PAGE) * PAGE - at
            if length:
                self._pages.cover(Cover(at, file, begin - (first - at), n_bytes))
        self._shared = length

    def _read(self, file: OpenFile, offset: int, length: int) -> None:
        self.ensure(length)
        for head, rows in enumerate(self.tensor[:, :length]):
            raw = os.pread(file.descriptor, length * self._row, offset + head * length * self._row)
            rows.copy_(torch.frombuffer(bytearray(raw), dtype=rows.dtype).view(rows.shape))

    def fork(self, length: int) -> "SharedRows":
        """Rows of their own that begin with the first `length` of these; what neither side changes is held once."""
        heads, capacity, dim = self.tensor.shape
        twin = SharedRows(heads, capacity, dim, self.tensor.dtype, self.folder, self._stride, self._skew)
        if CAN_COVER and length - self._shared > FEW:
            shared, whole = self._shared * self._row, length * self._row
            self._pages.freeze([(first + shared, first + whole) for first in self._starts()])
            self._shared = length
        held = self._lend(twin, min(length, self._shared)) if CAN_COVER else 0
        if held < length:
            twin.write(held, self.tensor[:, held:length])
        return twin

    def _lend(self, twin: "SharedRows", length: int) -> int:
        """Cover the twin as these rows are, whole pages of the first `length` rows; returns how many rows it holds."""
        for cover in self._covers(length):
            twin._pages.cover(cover)
        twin._shared = min(self._whole(first, length) // self._row for first in self._starts())
        return twin._shared

    def _covers(self, length: int) -> list[Cover]:
        """What covers the whole pages of the first `length` rows."""
        found = []
        for cover in self._pages.covers:
            first = self._skew + (cover.at + PAGE - 1 - self._skew) // self._stride * self._stride
            n_bytes = min(cover.n_bytes, first + self._whole(first, length) - cover.at)
            if n_bytes > 0:
                found.append(cover._replace(n_bytes=n_bytes))
        return found

    def _whole(self, first: int, length: int) -> int:
        """Bytes of the first `length` rows of the head that begins at `first` up to their last whole page."""
        return max(0, (first + length * self._row) // PAGE * PAGE - first)

    def _starts(self) -> list[int]:
        return [self._skew + head * self._stride for head in range(self.tensor.shape[0])]
