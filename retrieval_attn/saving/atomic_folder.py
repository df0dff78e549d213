"""Folders that stand on disk whole or not at all: written beside their place, flushed, and put there in one step."""

import ctypes
import errno
import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from retrieval_attn.atomic_file import flush

log = logging.getLogger("retrieval_attn")

# Of Linux: paths are relative to the working directory; the two names are exchanged.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_counter = itertools.count()
_in_use: set[str] = set()  # stems of the hidden folders that this process works on


def write_folder(target: Path, fill: Callable[[Path], None], at_least: int = 0) -> None:
    """Make a folder or replace one: whoever looks, after a crash at any instant, finds the old one or the new one.

    fill: writes files (no folders) into the folder it is given; none of them is seen before all are on the disk.
    at_least: bytes that it will write, as far as known. Old and new are on the disk together for a moment.

    Raises OSError, one line with path and reason, if this cannot be done; then, as after anything that `fill` raises,
    the old folder and nothing else is there. What dead processes left behind for the same name is removed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        for path, _ in _leftovers(target):
            shutil.rmtree(path, ignore_errors=True)
        _check_room(target.parent, at_least)
        with _temporary(target) as new:
            fill(new)
            for path in (*new.iterdir(), new):
                flush(path)
            _put_in_place(new, target)
    except (OSError, SafetensorError) as error:
        raise _not_saved(error, target, at_least) from error


def put_back(target: Path) -> None:
    """Undo a replacement whose process died between two renames; where one step sufficed there is nothing to do."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for path, kind in _leftovers(target):
        if kind == "old":
            log.warning("%s was being replaced when a process died; the old one is put back", target)
            path.rename(target)
            return


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    folder = target.with_name(f".{target.name}.{os.getpid()}.{next(_counter)}.tmp")
    _in_use.add(folder.stem)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder.stem)


def _leftovers(target: Path) -> list[tuple[Path, str]]:
    """Hidden folders beside `target` that no living process works on, each with its kind, "tmp" or "old"."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(\d{{1,9}})\.\d+\.(tmp|old)")
    matches = [(path, name.fullmatch(path.name)) for path in target.parent.iterdir()]
    return [(path, match[2]) for path, match in matches if match and not _is_busy(path, int(match[1]))]


def _is_busy(path: Path, pid: int) -> bool:
    # In a container, the process after a restart may well have the number of the one that died.
    return path.stem in _in_use if pid == os.getpid() else psutil.pid_exists(pid)


def _put_in_place(new: Path, target: Path) -> None:
    """Make `new` the folder at `target`; afterwards `new` names the old one, or nothing."""
    if not os.path.lexists(target):
        new.rename(target)
    elif not _exchange(new, target):
        _rename_twice(new, target)
    flush(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in a single step; False where the system knows no such step."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _rename_twice(new: Path, target: Path) -> None:
    """Replace `target` in two steps; after a kill between them the old one waits, hidden, for `put_back`."""
    old = new.with_suffix(".old")
    try:
        target.rename(old)
        new.rename(target)
        flush(target.parent)
    finally:
        if not os.path.lexists(target):
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _check_room(folder: Path, at_least: int) -> None:
    disk = shutil.disk_usage(folder)
    # Some network drives say 0 of everything.
    if disk.total and at_least > disk.free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _not_saved(error: OSError | SafetensorError, target: Path, at_least: int) -> OSError:
    """The one line for the user. An error of safetensors has the system's number only in its text."""
    number = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else number and int(number[1])
    if not code:
        return OSError(f"{target} was not saved: {error}")
    reason = os.strerror(code)
    if code in _FULL:
        free = shutil.disk_usage(next(path for path in target.parents if path.exists())).free
        reason += f"; at least {_amount(at_least)} are needed, {_amount(free)} are free"
    return OSError(code, f"{target} was not saved: {reason}")


def _amount(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"
