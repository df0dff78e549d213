"""A folder that knows when it is damaged: files, and a JSON manifest with the size and the SHA-256 of each.

The manifest's first line is the checksum of its other lines. A checksum finds accidents, not forgers: what a manifest
says must still be checked by whoever uses it.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as brief
from typing import Any

MANIFEST = "manifest.json"

# How a manifest begins, and how one of format 1 did.
_BEGINNINGS = (b'{"sha256": "', b'{\n "format": ')

# With a separator in its name, a file could lie anywhere.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Files that are hashed at once, each in pieces.
_AT_ONCE = 4


def is_sealed(folder: Path) -> bool:
    """Whether there is a folder with a manifest of ours, damaged or not."""
    try:
        with open(folder / MANIFEST, "rb") as file:
            return file.read(64).startswith(_BEGINNINGS)
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_manifest(folder: Path, version: int, fields: dict[str, Any]) -> None:
    """Seal all files of a folder.

    fields: what the manifest says besides "format", the version, and "files": {name: {"bytes": n, "sha256": hex}}.
    """
    paths = sorted(folder.iterdir())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    said = {"format": version, **fields, "files": files}
    body = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in said.items()) + "\n}\n"
    (folder / MANIFEST).write_bytes(_first_line(body.encode()) + b"\n" + body.encode())


def read_manifest(folder: Path, version: int) -> dict[str, Any]:
    """What `write_manifest` wrote, "files" included.

    Raises FileNotFoundError if there is none, ValueError with the reason if it is unfit: of another version, not what
    was written, or naming files outside the folder.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no saved session at {folder} ({MANIFEST} is missing)")
    _require_plain(path)
    raw = path.read_bytes()
    try:
        manifest: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged: it must hold an object, got {brief(manifest)}")
    # The version before the checksum, which another version may reckon in its own way.
    _check_version(path, manifest.get("format"), version)
    first, _, body = raw.partition(b"\n")
    if first != _first_line(body):
        raise ValueError(f"{path} is damaged: its checksum does not agree")
    _check_listing(path, manifest.get("files"))
    return manifest


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare a folder with the "files" of its manifest. Raises ValueError naming the file that is missing, of another
    size, not what was written, or a link. Files that are not listed are let be."""
    for entry in folder.iterdir():
        if entry.is_symlink():
            raise ValueError(f"{entry} is a link; put the file itself in its place")
    paths = [folder / name for name in files]
    for path, written in zip(paths, files.values(), strict=True):
        if not path.exists():
            raise ValueError(f"{folder} is incomplete: {path.name} is missing")
        _require_plain(path)
        if path.stat().st_size != written["bytes"]:
            raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, {written['bytes']} were written")
    for path, written, digest in zip(paths, files.values(), _digests(paths), strict=True):
        if digest != written["sha256"]:
            raise ValueError(f"{path} is damaged: its checksum does not agree")


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(body: bytes) -> bytes:
    return b'{"sha256": "%s",' % hashlib.sha256(body).hexdigest().encode()


def _require_plain(path: Path) -> None:
    """Refuse what leads elsewhere, and what may never end."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} must be a plain file, got a link, a folder or a device; put the file in its place")


def _check_version(path: Path, found: Any, ours: int) -> None:
    if type(found) is not int:
        raise ValueError(f"{path} is damaged: format must be an integer, got {brief(found)}")
    if found < ours:
        raise ValueError(
            f"{path} was saved by an earlier version: it has format {found}, this version reads format {ours}; "
            "make the session anew"
        )
    if found > ours:
        raise ValueError(
            f"{path} was saved by a later version: it has format {found}, this version reads format {ours}; "
            "upgrade retrieval-attn"
        )


def _check_listing(path: Path, files: Any) -> None:
    if not isinstance(files, dict):
        raise ValueError(f"{path} is damaged: files must be an object, got {brief(files)}")
    for name, written in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{path} is refused: files must have plain names without separators, got {brief(name)}")
        if not isinstance(written, dict) or [type(written.get(x)) for x in ("bytes", "sha256")] != [int, str]:
            raise ValueError(f"{path} is damaged: {name} must have bytes and sha256, got {brief(written)}")
