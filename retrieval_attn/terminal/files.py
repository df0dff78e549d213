"""Files that a person names: texts to read, folders of sessions, the history of lines."""

import atexit
import codecs
import os
import shlex
import sys
from pathlib import Path
from typing import Any

# The longer marks first: UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(name: str, encoding: str | None = None) -> str:
    """The text of a file: UTF-8, what its byte order mark says, or `encoding`.

    Raises OSError or ValueError, naming the file and the reason, if it cannot be read, is empty, or is not text.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a directory; name the files in it")
    if path.exists() and not (path.is_file() or path.is_fifo()):
        raise ValueError(f"{name} is a device, not a file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name}") from None
    except OSError as error:
        raise type(error)(f"{name} cannot be read: {error.strerror}") from error
    text = _decode(name, raw, encoding).replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{name} is empty; there is nothing to read")
    return text


def _decode(name: str, raw: bytes, encoding: str | None) -> str:
    marked = next((kind for mark, kind in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)
    chosen = encoding or marked or "utf-8"
    if not encoding and not marked and b"\0" in raw:
        raise ValueError(f"{name} is binary, not text (it holds zero bytes)")
    try:
        return raw.decode(chosen)
    except LookupError:
        raise ValueError(f"unknown encoding {chosen!r}; try utf-8, utf-16, latin-1 or cp1252") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {chosen}: byte 0x{raw[error.start]:02x} at {error.start}; name its encoding "
            f"(--encoding latin-1) or convert it (iconv -f latin1 -t utf-8 {shlex.quote(name)} > new.txt)"
        ) from None


def own_folder(variable: str, default: str) -> Path:
    """Our folder below the one that a variable of the XDG standard names."""
    return Path(os.environ.get(variable) or default).expanduser() / "retrieval-attn"


def sessions_home() -> Path:
    """Where sessions with a plain name are saved."""
    return own_folder("XDG_DATA_HOME", "~/.local/share") / "sessions"


def session_folder(name: str) -> Path:
    """The folder of a session: a path if `name` looks like one, else of that name among the saved sessions."""
    if not name.strip():
        raise ValueError("a session needs a name or a folder")
    if "/" in name or name.startswith(("~", ".")):
        return Path(name).expanduser()
    return sessions_home() / name


def is_session(folder: Path) -> bool:
    """Whether a session was saved there."""
    return (folder / "manifest.json").is_file()


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def remember_lines() -> None:
    """Let `input` edit lines and recall those of earlier chats, where the system can."""
    try:
        import readline

        path = own_folder("XDG_STATE_HOME", "~/.local/state") / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(1000)
        if path.exists():
            readline.read_history_file(path)
        atexit.register(_write_history, path)
    except (ImportError, OSError):
        return


def _write_history(path: Path) -> None:
    import readline

    try:
        readline.write_history_file(path)
    except OSError:
        return


def is_a_person(stream: Any = None) -> bool:
    """Whether someone types at a terminal."""
    return (stream or sys.stdin).isatty()
