"""A folder is old or new at every instant, and nothing else is left beside it."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from safetensors import SafetensorError

from retrieval_attn.saving import atomic_folder

steps = pytest.mark.parametrize("one_step", [True, False])


def writer(text):
    def fill(folder):
        for name in ("a", "b"):
            (folder / name).write_text(text)

    return fill


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = ({"a": text, "b": text} for text in ("old", "new"))


@pytest.fixture
def target(tmp_path):
    atomic_folder.write_folder(tmp_path / "some.name", writer("old"))
    return tmp_path / "some.name"


@pytest.fixture(scope="module")
def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@steps
def test_made_then_replaced(target, one_step, monkeypatch):
    assert content(target) == OLD
    if not one_step:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda a, b: False)
    atomic_folder.write_folder(target, writer("new"))
    assert content(target) == NEW
    assert list(target.parent.iterdir()) == [target]


def test_folders_above_are_made(tmp_path):
    atomic_folder.write_folder(tmp_path / "x" / "y", writer("new"))
    assert content(tmp_path / "x" / "y") == NEW


@steps
@pytest.mark.parametrize("there", [True, False])
def test_interrupted_at_every_step(target, one_step, there, monkeypatch):
    """Before and after each call that the disk sees."""
    for when in range(1000):
        shutil.rmtree(target, ignore_errors=True)
        if there:
            atomic_folder.write_folder(target, writer("old"))
        with monkeypatch.context() as patch:
            interrupt_at(patch, when)
            if not one_step:
                patch.setattr(atomic_folder, "_exchange", lambda a, b: False)
            try:
                atomic_folder.write_folder(target, writer("new"))
                break
            except KeyboardInterrupt:
                pass
        assert list(target.parent.iterdir()) == ([target] if there or target.exists() else [])
        assert not target.exists() or content(target) in ((OLD, NEW) if there else (NEW,))
    assert when > 10
    assert content(target) == NEW


def interrupt_at(patch, when):
    """Raise before the call number `when` of those that the disk sees, or after it: even numbers are before."""
    calls = iter(range(0, 10**6, 2))

    def interrupted(function):
        def run(*args, **kwargs):
            number = next(calls)
            if number == when:
                raise KeyboardInterrupt
            try:
                return function(*args, **kwargs)
            finally:
                if number + 1 == when:
                    raise KeyboardInterrupt

        return run

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (atomic_folder, "_exchange")):
        patch.setattr(owner, name, interrupted(getattr(owner, name)))


def test_killed_between_two_renames_the_old_folder_is_put_back(target, dead_pid):
    hidden = target.with_name(f".{target.name}.{dead_pid}.7")
    target.rename(f"{hidden}.old")
    atomic_folder.put_back(target)
    assert content(target) == OLD
    target.rename(f"{hidden}.old")
    atomic_folder.write_folder(target, writer("new"))
    assert content(target) == NEW
    assert list(target.parent.iterdir()) == [target]


def test_nothing_to_put_back(tmp_path):
    atomic_folder.put_back(tmp_path / "nothing")
    atomic_folder.put_back(tmp_path / "no folder" / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_processes_left_for_this_name_is_removed(target, dead_pid):
    gone = [f".{target.name}.{pid}.{n}" for n, pid in enumerate((dead_pid, os.getpid()), start=10**6)]
    kept = [f".{target.name}.{os.getppid()}.0", f".{target.name}x.{dead_pid}.0", f".{target.name}.5.{dead_pid}.0"]
    for name in gone + kept:
        target.with_name(f"{name}.tmp").mkdir()
    atomic_folder.write_folder(target, writer("new"))
    assert {path.name for path in target.parent.iterdir()} == {target.name, *(f"{name}.tmp" for name in kept)}


def test_a_second_thread_leaves_the_first_ones_folder_alone(target):
    def fill(folder):
        atomic_folder.write_folder(target, writer("old"))
        writer("new")(folder)

    atomic_folder.write_folder(target, fill)
    assert content(target) == NEW


@pytest.mark.parametrize(
    ("error", "number", "says"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC, r"No space left on device; at least 1.50 GiB are needed, .* free$"),
        (PermissionError(errno.EACCES, "x"), errno.EACCES, "was not saved: Permission denied$"),
        (SafetensorError("I/O error: No space left (os error 28)"), errno.ENOSPC, "No space left on device; at least"),
        (SafetensorError("odd"), None, "was not saved: odd$"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_folder_and_one_line(target, error, number, says, monkeypatch):
    def fill(folder):
        writer("new")(folder)
        raise error

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))
    with pytest.raises(OSError, match=says) as caught:
        atomic_folder.write_folder(target, fill, at_least=3 * 2**29)
    assert caught.value.errno == number
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(target) == OLD
    assert list(target.parent.iterdir()) == [target]


def test_too_little_room_is_said_before_anything_is_written(target):
    def fill(folder):
        raise AssertionError("nothing may be written")

    with pytest.raises(OSError, match=r"at least 1048576.00 GiB are needed, .* are free") as caught:
        atomic_folder.write_folder(target, fill, at_least=2**50)
    assert caught.value.errno == errno.ENOSPC
    assert content(target) == OLD


def test_a_disk_of_unknown_size_is_not_called_full(target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 0))
    atomic_folder.write_folder(target, writer("new"), at_least=2**50)
    assert content(target) == NEW


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_the_single_step_of_linux(target, tmp_path):
    atomic_folder.write_folder(tmp_path / "other", writer("new"))
    assert atomic_folder._exchange(target, tmp_path / "other")
    assert content(target) == NEW
    assert content(tmp_path / "other") == OLD
    with pytest.raises(FileNotFoundError):
        atomic_folder._exchange(target, tmp_path / "nothing")
