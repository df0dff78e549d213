"""Address space for what may come: free until it is written, on disk if asked, shared with forks copy-on-write.

Parts of a file can lie over a part of it ("cover"): they are read from the file, and what is written becomes private
memory. So a fork shares what it has in common with its origin, and a restored session is read where it lies.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE

# Whether files can cover address space: `cover` and `freeze` work on Linux alone; elsewhere forks copy.
CAN_COVER = sys.platform == "linux"

# Linux flags: address space now, memory when touched; put the mapping at this very address.
_NORESERVE, _FIXED = (0x4000, 0x10) if CAN_COVER else (0, 0)

# Bytes that are allocated on disk at a time, and that are moved to a file at a time.
_DISK_STEP, _MOVE_STEP = 1 << 20, 1 << 26

OUT_OF_MEMORY = "use kv_dtype='int8', kv_dir=PATH (keys and values on disk), or a shorter text"


class OpenFile:
    """A file descriptor that is closed when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Cover(NamedTuple):
    """Whole pages of a file that lie over pages: from byte `at` on are the file's from `offset` on."""

    at: int
    file: OpenFile
    offset: int
    n_bytes: int


class AddressSpace:
    """`n_bytes` of address space, which become memory, or room on a disk, as they are written.

    Not for two threads that change it at once; reading while another thread covers or freezes is safe.
    """

    def __init__(self, n_bytes: int, folder: Path | None = None) -> None:
        """folder: where the bytes lie on disk, in a file without a name; None: in memory.

        Raises MemoryError if the system refuses the address space, OSError if the file cannot be made.
        """
        self.n_bytes = max(PAGE, -(-n_bytes // PAGE) * PAGE)
        self.folder = folder
        self.file = None if folder is None else _unnamed_file(folder, self.n_bytes)
        self.covers: list[Cover] = []
        # Two lists, because an interruption may come between: what may be covered, and what surely is.
        self._maybe_covered: list[tuple[int, int]] = []
        self._surely_covered: list[tuple[int, int]] = []
        self._on_disk: dict[int, int] = {}
        self._huge = False
        self._buffer = _reserve(self.n_bytes, self.file)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def tensor(self, dtype: torch.dtype, first: int = 0) -> Tensor:
        """The bytes from `first` on as one flat tensor, which keeps the pages alive."""
        count = (self.n_bytes - first) // dtype.itemsize
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=first)

    def ensure(self, first: int, stop: int) -> None:
        """Make sure that bytes first..stop can be written. Raises OSError if the disk is full; nothing is lost then.

        Without this a full disk would end the process at the first write. What is covered needs no room: writing to it
        takes memory.
        """
        if self.file is None:
            return
        done = max(self._on_disk.get(first, first), self._covered_until(first))
        if stop > done:
            upto = min(self.n_bytes, -(-stop // _DISK_STEP) * _DISK_STEP)
            _allocate(self.file, done, upto)
            self._on_disk[first] = upto

    def prefer_huge_pages(self) -> None:
        """What is written from now on lies in huge pages where the system has them.

        Retrieved rows lie far apart: in small pages every one of them would miss the TLB. In huge ones whatever is
        touched takes a whole one, which is much more than a short text needs.
        """
        if self._huge or self.file is not None or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        self._huge = True
        # A kernel without huge pages takes the wish for an error.
        with contextlib.suppress(OSError):
            self._buffer.madvise(mmap.MADV_HUGEPAGE)

    def _covered_until(self, first: int) -> int:
        """Where the covers end that lie over `first` and on from there."""
        for at, end in self._surely_covered:
            if at <= first < end:
                first = end
        return first

    def cover(self, cover: Cover) -> None:
        """Lay pages of a file over these: what was here is gone, what is written here leaves the file as it is."""
        span = cover.at, cover.at + cover.n_bytes
        self._maybe_covered.append(span)
        address = self._address + cover.at
        flags = mmap.MAP_PRIVATE | _FIXED | _NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        there = _libc().mmap(address, cover.n_bytes, protection, flags, cover.file.descriptor, cover.offset)
        if there != address:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {cover.n_bytes} bytes of a file: {os.strerror(number)}")
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _libc().madvise(address, cover.n_bytes, mmap.MADV_HUGEPAGE)
        self.covers.append(cover)
        self._surely_covered.append(span)

    def freeze(self, spans: Sequence[tuple[int, int]]) -> None:
        """Lay a file of the same content over some spans of bytes, as whole pages: forks can be covered by it, too.

        Their content and address stay. What has been covered once goes to a new file: a fork may read the old one.
        """
        whole = [(first // PAGE * PAGE, min(self.n_bytes, -(-stop // PAGE) * PAGE)) for first, stop in spans]
        if self.file is not None and not any(self._may_be_covered(*span) for span in whole):
            for first, stop in whole:
                self.cover(Cover(first, self.file, first, stop - first))
            return
        file, written = self._empty_file(sum(stop - first for first, stop in whole)), 0
        for first, stop in whole:
            # Piece by piece, so that no more than one piece is held twice.
            for at in range(first, stop, _MOVE_STEP):
                n_bytes = min(_MOVE_STEP, stop - at)
                _write(file.descriptor, memoryview(self._buffer)[at : at + n_bytes], written)
                self.cover(Cover(at, file, written, n_bytes))
                written += n_bytes

    def _may_be_covered(self, first: int, stop: int) -> bool:
        return any(at < stop and first < end for at, end in self._maybe_covered)

    def _empty_file(self, n_bytes: int) -> OpenFile:
        if self.folder is not None:
            on_disk = _unnamed_file(self.folder, n_bytes)
            _allocate(on_disk, 0, n_bytes)
            return on_disk
        file = OpenFile(os.memfd_create("kv"))
        os.ftruncate(file.descriptor, n_bytes)
        return file


def _allocate(file: OpenFile, start: int, stop: int) -> None:
    """Take room for bytes start..stop of a file."""
    try:
        os.posix_fallocate(file.descriptor, start, stop - start)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"the disk of kv_dir is full ({stop - start} bytes more were needed); free some room, or give another "
            "folder",
        ) from error


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _unnamed_file(folder: Path, n_bytes: int) -> OpenFile:
    """A sparse file that is gone when the process is, however it ends."""
    try:
        with tempfile.TemporaryFile(dir=folder) as made:
            file = OpenFile(os.dup(made.fileno()))
        os.ftruncate(file.descriptor, n_bytes)
    except OSError as error:
        raise OSError(error.errno, f"kv_dir {str(folder)!r} cannot hold keys and values: {error.strerror}") from error
    return file


def _reserve(n_bytes: int, file: OpenFile | None) -> mmap.mmap:
    try:
        if file is not None:
            return mmap.mmap(file.descriptor, n_bytes)
        return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError) as error:
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE
        raise MemoryError(
            f"the system refused {n_bytes / 2**30:.2f} GiB of address space, {free / 2**30:.2f} GiB of memory are "
            f"free ({error}); raise the process limit (ulimit -v), or {OUT_OF_MEMORY}"
        ) from error


_loading = threading.Lock()
_loaded: list[ctypes.CDLL] = []


def _libc() -> ctypes.CDLL:
    with _loading:
        if not _loaded:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            _loaded.append(libc)
        return _loaded[0]
