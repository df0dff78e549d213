"""Every byte of a sealed folder is under a checksum, and only its own plain files are read."""

import hashlib
import json
import os
import random

import pytest

from retrieval_attn.saving.checksums import MANIFEST, check_files, is_sealed, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir()
    for name, content in (("a.bin", b"first"), ("b.bin", b"second"), ("empty", b"")):
        (folder / name).write_bytes(content)
    write_manifest(folder, 5, {"text": "naïve\n", "ids": [1, 2, 3]})
    return folder


def check(folder):
    manifest = read_manifest(folder, 5)
    check_files(folder, manifest["files"])
    return manifest


def seal_by_hand(folder, manifest):
    """As a forger would."""
    body = json.dumps(manifest)[1:].encode()
    digest = hashlib.sha256(body).hexdigest()
    (folder / MANIFEST).write_bytes(b'{"sha256": "%s",\n' % digest.encode() + body)


def test_what_was_said_comes_back(folder):
    manifest = check(folder)
    assert manifest["text"] == "naïve\n"
    assert manifest["ids"] == [1, 2, 3]
    assert manifest["files"]["b.bin"] == {"bytes": 6, "sha256": hashlib.sha256(b"second").hexdigest()}
    assert is_sealed(folder)


def test_every_flipped_byte_is_found_and_named(folder):
    flip = random.Random(0)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << flip.randrange(8)]) + good[at + 1 :])
            with pytest.raises(ValueError, match=path.name):
                check(folder)
        path.write_bytes(good)
    check(folder)


def test_every_truncation_is_found_and_named(folder):
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for length in range(len(good)):
            path.write_bytes(good[:length])
            with pytest.raises(ValueError, match=path.name):
                check(folder)
        path.write_bytes(good)
    check(folder)


def test_missing_files(folder):
    (folder / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"incomplete: a.bin is missing"):
        check(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"no saved session at .* \(manifest.json is missing\)"):
        check(folder)
    assert not is_sealed(folder)


@pytest.mark.parametrize("name", ["a.bin", MANIFEST, "unlisted"])
def test_links_are_refused(folder, tmp_path, name):
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}.* a link"):
        check(folder)


@pytest.mark.parametrize("name", ["a.bin", MANIFEST])
def test_what_never_ends_is_refused(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} must be a plain file"):
        check(folder)


def test_files_that_are_not_listed_are_let_be(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes").mkdir()
    check(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.bin", "sub/a.bin", "sub\\a.bin", "..", "", "a\0b", "\ud800"])
def test_names_that_lead_elsewhere_are_refused(folder, name):
    manifest = read_manifest(folder, 5)
    manifest["files"] = {name: manifest["files"]["a.bin"]}
    seal_by_hand(folder, {key: value for key, value in manifest.items() if key != "sha256"})
    with pytest.raises(ValueError, match="manifest.json is refused: files must have plain names without separators"):
        check(folder)


@pytest.mark.parametrize(
    ("listing", "says"),
    [
        (None, "files must be an object, got None"),
        (["a.bin"], "files must be an object"),
        ({"a.bin": 5}, "a.bin must have bytes and sha256, got 5"),
        ({"a.bin": {"bytes": True, "sha256": ""}}, "a.bin must have bytes and sha256"),
        ({"a.bin": {"bytes": 5}}, "a.bin must have bytes and sha256"),
    ],
)
def test_listings_of_another_shape(folder, listing, says):
    seal_by_hand(folder, {"format": 5, "files": listing})
    with pytest.raises(ValueError, match=f"manifest.json is damaged: {says}"):
        check(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"format": ' + "9" * 10_000 + "}", "is not JSON"),
        ("[]", r"must hold an object, got \[\]"),
        ("null", "must hold an object, got None"),
        ("{}", "format must be an integer, got None"),
        ('{"format": true}', "format must be an integer, got True"),
        ('{"format": "5"}', "format must be an integer, got '5'"),
        ('{"format": 4}', "earlier version: it has format 4, this version reads format 5"),
        ('{"format": 6}', "later version: it has format 6, this version reads format 5"),
        ('{"format": 5}', "its checksum does not agree"),
    ],
)
def test_other_manifests(folder, text, says):
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"manifest.json .*{says}"):
        check(folder)


def test_a_manifest_of_something_else_is_not_ours(tmp_path):
    assert not is_sealed(tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "a browser extension"}')
    assert not is_sealed(tmp_path)
    assert not is_sealed(tmp_path / MANIFEST)
    (tmp_path / MANIFEST).write_text('{\n "format": 1,\n "versions": {}}')
    assert is_sealed(tmp_path)
