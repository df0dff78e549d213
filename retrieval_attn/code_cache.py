"""Where compiled code is kept: a file per function and signature, in a folder named by a digest of all sources.

Numba's own cache looks at the file of a function and not at those of the functions that it calls, whose code is
compiled into it: after an edit of a loop, all that call it ran as before. And it raises where no folder can be written.
Here an edit of any compiled source begins a new folder, and whatever is wrong with the disk costs a compilation and a
warning, never the call. There is no list of files that two processes could disagree about.

What is kept is executed. So each folder is its user's own, and nobody else can write to it.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import pickle
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy
from numba.core import serialize
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult

from retrieval_attn.atomic_file import write_whole

log = logging.getLogger("retrieval_attn")

# What is compiled lies in these rooms, and constants that it takes from elsewhere do too.
COMPILED = ("index", "kernels", "threads.pool", "arrays", "compiled", "code_cache")

# So many versions of the sources keep their code, those used last. A process of another compiles anew, no worse.
VERSIONS_KEPT = 16


# What numba is told about the code that it makes, beside the processor.
SWITCHES = (
    "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES",
    "USING_SVML", "DISABLE_INTEL_SVML", "LLVM_REFPRUNE_PASS", "LLVM_REFPRUNE_FLAGS", "PARFOR_MAX_TUPLE_SIZE",
    "ENABLE_PROFILING", "JIT_COVERAGE", "DEBUG_ARRAY_OPT_RUNTIME", "DEBUG_NRT",
)  # fmt: skip


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sources() -> list[Path]:
    """The files that compiled code is made from."""
    files: list[Path] = []
    for room in COMPILED:
        origin = Path(importlib.util.find_spec(f"retrieval_attn.{room}").origin)  # type: ignore[union-attr, arg-type]
        files += sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return files


# Found once: where files are gone that were there, Python's finders may raise anything.
SOURCES = tuple(sources())


def digest() -> str:
    """Of what the sources say now, and of what compiles them."""
    made_by = [numba.__version__, llvmlite.__version__, numpy.__version__, sys.implementation.cache_tag]
    return _hash(" ".join([*made_by, *(_hash(file.read_bytes()) for file in SOURCES)]).encode())


# Of the sources as they are imported; taken early, because they may be edited while this process runs.
DIGEST = digest()


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


class Place(NamedTuple):
    """A folder for compiled code of all versions. named: by the user, who may share it with others."""

    base: Path
    named: bool

    def folder(self) -> Path:
        """The folder of this version, made if it is not there. Raises OSError if it cannot be, or is not safe."""
        folder = self.base / DIGEST
        _make(folder)
        _require_kept(self.base.parent)
        _require_own(self.base)
        _require_own(folder)
        return folder

    def enter(self) -> None:
        """Note that this version is used; keep those used last. Raises OSError if nothing can be written."""
        folder = self.folder()
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)
        # Other processes do the same, so that what is listed may be gone.
        with suppress(OSError):
            versions = sorted(self.base.iterdir(), key=lambda version: version.stat().st_mtime)
            for version in versions[:-VERSIONS_KEPT]:
                shutil.rmtree(version, ignore_errors=True)


class UnsafeFolder(PermissionError):
    """Others could put code into this folder."""


def _make(folder: Path) -> None:
    """Make a folder and those above it that are missing, each for this user alone, whatever the umask."""
    if not folder.parent.exists():
        _make(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _require_own(folder: Path) -> None:
    """Code is run from there: nobody else may have made the folder, or be able to write to it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UnsafeFolder(f"{folder} is not a folder that only this user can write to")


def _require_kept(parent: Path) -> None:
    """Nobody else may be able to exchange what this user has in `parent`, as in a folder for all that is not sticky."""
    status = parent.stat()
    for_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if for_all or status.st_uid not in (0, os.geteuid()):
        raise UnsafeFolder(f"others can exchange what is in {parent}")


def _named_place() -> Place | None:
    named: str = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    return Place(Path(named) / "retrieval-attn", named=True) if named else None


def _users_place() -> Place | None:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # Without a home, "~" stays as it is: that would be a folder of this name in the current one.
    return Place(home / "retrieval-attn" / "numba", named=False) if home.is_absolute() else None


def _temporary_place() -> Place:
    """Raises FileNotFoundError if there is no temporary directory either."""
    return Place(Path(tempfile.gettempdir()) / f"retrieval-attn-{os.geteuid()}", named=False)


@functools.cache
def place() -> Place | None:
    """Where this process keeps compiled code: NUMBA_CACHE_DIR, the user's cache folder, or a folder of the user's own
    under the temporary directory. None, with a warning that says why, if none of them can be used."""
    reasons = []
    for find in (_named_place, _users_place, _temporary_place):
        candidate = None
        try:
            candidate = find()
            if candidate is not None:
                candidate.enter()
                return candidate
        except OSError as error:
            reasons.append(str(error))
            if candidate is not None and (candidate.named or isinstance(error, UnsafeFolder)):
                name = "NUMBA_CACHE_DIR" if candidate.named else candidate.base
                log.warning("compiled code is not kept in %s: %s", name, error)
    log.warning(
        "compiled code cannot be kept, so that every process compiles anew: no folder can be used (%s); "
        "set NUMBA_CACHE_DIR to one",
        "; ".join(reasons),
    )
    return None


class CodeCache(NullCache):
    """The compiled code of one function, as numba's dispatcher asks for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        code = function.__code__
        # What a function closes over is compiled into it, and stands in no file.
        assert not code.co_freevars, f"{function.__qualname__} closes over {code.co_freevars}"
        self._name = function.__qualname__.replace("<locals>", "locals")
        # Tests have compiled functions that are not among the sources.
        self._source = (function.__module__, code.co_firstlineno, _source_of(code.co_filename))

    @property
    def cache_path(self) -> str | None:
        where = place()
        return None if where is None else str(where.base / DIGEST)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was kept for arguments of these types; None makes numba compile."""
        target_context.refresh()
        where = place()
        if where is None:
            return None
        try:
            kept = self._file(where, sig, target_context.codegen()).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn_once(f"compiled code cannot be read: {error}")
            return None
        check, _, code = kept.partition(b"\n")
        if _hash(code).encode() != check:
            _warn_once(f"compiled code in {where.base} is damaged; compiling anew")
            return None
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(code))
        # What pickle and numba raise depends on the bytes, which need not be of this numba: it may be anything.
        except Exception as error:
            _warn_once(f"compiled code in {where.base} cannot be used ({error!r}); compiling anew")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what numba compiled, if it may be kept and can be."""
        where = place()
        # Addresses of this process mean nothing to another.
        if where is None or data.library.has_dynamic_globals:
            return
        code = serialize.dumps(data._reduce())
        try:
            # Sources that were edited since are not what was compiled.
            if digest() == DIGEST:
                write_whole(self._file(where, sig, data.codegen), _hash(code).encode() + b"\n" + code)
        except OSError as error:
            _warn_once(f"compiled code cannot be kept: {error}")

    def _file(self, where: Place, sig: Any, codegen: Any) -> Path:
        """The file's name holds all that code depends on beside the sources: types, processor, numba's switches."""
        switches = [str(getattr(numba.config, name)) for name in SWITCHES]
        key = _hash(repr((self._source, sig, codegen.magic_tuple(), switches)).encode())
        return where.folder() / f"{self._name}.{key}"


@functools.cache
def _source_of(filename: str) -> str:
    return _hash(Path(filename).read_bytes())
