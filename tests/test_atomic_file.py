"""Files that are whole or not there, whatever happens while they are written."""

import os
import stat
import threading

import pytest

from retrieval_attn import atomic_file
from retrieval_attn.atomic_file import replacing, write_whole


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    return path


@pytest.mark.parametrize("content", ["new, also ü\r\n", b"\xff\x00new"])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_nothing_else_is_left(file, content, durable):
    write_whole(file, content, durable)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(file.parent) == [file.name]


def test_a_new_file_is_made_with_the_usual_rights(tmp_path):
    write_whole(tmp_path / "new", "x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "plain")]
    assert modes[0] == modes[1]


def test_the_old_file_is_there_until_the_new_one_is_whole(file):
    with replacing(file) as part:
        part.write_text("half")
        assert file.read_text() == "old"
        assert part.parent == file.parent
    assert file.read_text() == "half"


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o664])
def test_a_file_keeps_its_mode(file, mode):
    file.chmod(mode)
    write_whole(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_not_replaced(tmp_path, make, linked):
    """A rename would put the file in the place of the pipe, or of a device."""
    make(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="other is not a regular file"):
        write_whole(tmp_path / ("link" if linked else "other"), "x")
    assert not (tmp_path / "other").is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "other"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["write", "replace"])
def test_after_an_exception_the_old_file_is_there_and_nothing_else(file, monkeypatch, error, where):
    def fail(*paths):
        raise error

    if where == "replace":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error), replacing(file) as part:
        part.write_text("half")
        if where == "write":
            raise error
    assert file.read_text() == "old"
    assert os.listdir(file.parent) == [file.name]


def test_a_link_stays_a_link(file, tmp_path):
    (tmp_path / "else").mkdir()
    link = tmp_path / "else" / "link"
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert os.listdir(link.parent) == ["link"]


def test_writers_at_the_same_time_do_not_meet(file):
    """A temporary name made of the process's number was the same for two threads: one lost its file to the other."""
    texts = [str(i) * 100_000 for i in range(8)]
    errors = []

    def write(text):
        try:
            for _ in range(20):
                write_whole(file, text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert file.read_text() in texts
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("durable", [False, True])
def test_what_must_be_durable_is_flushed_before_it_is_put_in_place_and_its_folder_after(file, monkeypatch, durable):
    done, replace = [], os.replace
    monkeypatch.setattr(atomic_file, "flush", lambda path: done.append("folder" if path.is_dir() else "file"))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_whole(file, "new", durable)
    assert done == (["file", "replace", "folder"] if durable else ["replace"])
