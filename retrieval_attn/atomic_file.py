"""Files that stand on disk whole or not at all: written beside their place, and put there in one step."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """Give a path to write a file at, which takes the place of `path` at the end; after an exception it is removed.

    Whoever looks, meanwhile or after a crash of the process, finds the old file or the new one. Several writers at once
    do not meet: the last one's file stays. A link stays a link, and a file keeps its mode. durable: also after the
    machine loses its power. Raises OSError for a device, a pipe or a folder, which no file should replace.

    A process that is killed leaves its half file, .NAME.*.tmp, behind: from within a container, or on a disk of several
    machines, nobody can tell whether its writer is alive.
    """
    # Beside a link, the file it points to could be on another disk.
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield part
        if mode is not None:
            part.chmod(mode)
        if durable:
            flush(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        flush(target.parent)


def _mode_of(target: Path) -> int | None:
    """The mode of a regular file; None if nothing is there yet."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(f"{target} is not a regular file, and is not replaced by one")
    return stat.S_IMODE(mode)


def write_whole(path: str | os.PathLike[str], content: str | bytes, durable: bool = False) -> None:
    """Write a text (as UTF-8) or bytes to a file that is whole or not there; see `replacing`."""
    with replacing(path, durable) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
