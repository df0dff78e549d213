"""Compiled code is kept on disk, follows its sources, and no trouble with the disk reaches a call."""

import ast
import importlib.util
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from laws import rarely
from numba.core import event

from retrieval_attn import code_cache, compiled
from retrieval_attn.code_cache import VERSIONS_KEPT, Place
from retrieval_attn.compiled import NOTICE, CompilationNotice, jit

ROOT = Path(__file__).parent.parent

# No folder can be made below a file, not even by root.
NOWHERE = "/dev/null/nowhere"


# Whatever numba is told about the code that it makes.
SWITCHES = ["OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES"]
SWITCHES += ["USING_SVML", "DISABLE_INTEL_SVML", "LLVM_REFPRUNE_PASS", "LLVM_REFPRUNE_FLAGS", "PARFOR_MAX_TUPLE_SIZE"]
SWITCHES += ["ENABLE_PROFILING", "JIT_COVERAGE", "DEBUG_ARRAY_OPT_RUNTIME", "DEBUG_NRT"]


@pytest.fixture
def base(monkeypatch, tmp_path):
    """The folder in which this test's compiled code is kept."""
    monkeypatch.setattr(code_cache, "place", lambda: Place(tmp_path, named=True))
    code_cache._warn_once.cache_clear()
    return tmp_path


def function():
    """A compiled function as a process has it that has not called it yet; always the same one."""

    @jit()
    def double(x):
        return x + x

    return double


def files(base):
    return sorted((base / code_cache.DIGEST).iterdir())


def n_compiled(*functions):
    return sum(sum(f.stats.cache_misses.values()) for f in functions)


def test_what_was_compiled_once_is_read(base):
    first, second = function(), function()
    assert first(2) == second(2) == 4
    assert (n_compiled(first), n_compiled(second)) == (1, 0)
    assert second(2.5) == 5
    assert n_compiled(second) == 1
    assert len(files(base)) == 2


def test_other_switches_of_numba_are_other_code(base, monkeypatch):
    function()(2)
    monkeypatch.setattr("numba.config.BOUNDSCHECK", 1)
    second = function()
    second(2)
    assert n_compiled(second) == 1


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_is_part_of_the_name(base, monkeypatch, switch):
    double = function()
    double(2)
    codegen = double.targetctx.codegen()
    names = {double._cache._file(code_cache.place(), "sig", codegen)}
    monkeypatch.setattr(f"numba.config.{switch}", "another")
    assert double._cache._file(code_cache.place(), "sig", codegen) not in names


@pytest.mark.parametrize("library", ["numba", "llvmlite", "numpy"])
def test_other_libraries_make_other_code(monkeypatch, library):
    monkeypatch.setattr(f"{library}.__version__", "another")
    assert code_cache.digest() != code_cache.DIGEST


def test_no_compiled_function_closes_over_anything():
    """Two of one name would be one file, whatever they close over."""
    factor = len("abc")
    with pytest.raises(AssertionError, match="closes over"):

        @jit()
        def times(x):
            return factor * x


def test_sources_edited_meanwhile_are_not_what_was_compiled(base, monkeypatch):
    monkeypatch.setattr(code_cache, "digest", lambda: "edited")
    assert function()(2) == 4
    assert files(base) == []


def test_sources_that_are_gone_break_no_call(base, monkeypatch):
    monkeypatch.setattr(code_cache, "SOURCES", [Path(NOWHERE)])
    assert function()(2) == 4
    assert files(base) == []


def test_rooms_that_are_gone_break_no_call(base, monkeypatch):
    """Python finds nothing, and not even a file without content, where a room was that nothing has imported yet."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert function()(2) == 4
    assert len(files(base)) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:100] + b"?" + b[101:], lambda b: b""])
def test_damaged_code_is_compiled_anew(base, damage, caplog):
    function()(2)
    (file,) = files(base)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    second, third = function(), function()
    assert second(2) == third(2) == 4
    assert (n_compiled(second), n_compiled(third)) == (1, 0)
    assert "is damaged; compiling anew" in caplog.text


def not_of_this_numba():
    raise RuntimeError("not of this numba")


class Foreign:
    def __reduce__(self):
        return not_of_this_numba, ()


@pytest.mark.parametrize("code", [b"no pickle", pickle.dumps((1, 2)), pickle.dumps(Foreign())])
def test_whole_code_that_cannot_be_used_is_compiled_anew(base, code, caplog):
    function()(2)
    (file,) = files(base)
    file.write_bytes(code_cache._hash(code).encode() + b"\n" + code)
    second, third = function(), function()
    assert second(2) == third(2) == 4
    assert (n_compiled(second), n_compiled(third)) == (1, 0)
    assert len([message for message in caplog.messages if "cannot be used" in message]) == 1


def test_a_folder_deleted_meanwhile_comes_back(base):
    function()(2)
    shutil.rmtree(base)
    second = function()
    assert second(2) == 4
    assert n_compiled(second) == 1
    assert len(files(base)) == 1


def test_a_file_that_cannot_be_read_costs_a_compilation(base, caplog):
    function()(2)
    (file,) = files(base)
    file.unlink()
    file.mkdir()
    assert function()(2) == 4
    assert "compiled code cannot be read" in caplog.text


@contextmanager
def full_disk():
    """Inside, no file can grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_once_and_breaks_no_call(base, caplog):
    double = function()
    with full_disk():
        assert (double(2), double(2.5)) == (4, 5)
    assert len([message for message in caplog.messages if "cannot be kept" in message]) == 1
    assert files(base) == []


def test_versions_used_last_are_kept(tmp_path):
    for age in range(2 * VERSIONS_KEPT):
        (tmp_path / f"{age}" / "code").mkdir(parents=True)
        os.utime(tmp_path / f"{age}", (1e9 - age, 1e9 - age))
    Place(tmp_path, named=True).enter()
    kept = {str(age) for age in range(VERSIONS_KEPT - 1)}
    assert {version.name for version in tmp_path.iterdir()} == kept | {code_cache.DIGEST}


def test_versions_that_cannot_be_listed_stay(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    Place(tmp_path, named=True).enter()


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_is_made_for_this_user_alone(tmp_path, named):
    before = os.umask(0)
    try:
        folder = Place(tmp_path / "above" / "base", named).folder()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_version_that_others_could_write_to_is_refused(tmp_path, named, mode):
    place = Place(tmp_path / "base", named)
    place.folder().chmod(mode)
    with pytest.raises(PermissionError, match="only this user can write to"):
        place.folder()


def test_others_must_not_be_able_to_exchange_the_folder(tmp_path):
    """In a folder for all, like that of temporary files, each has what is theirs, if it is sticky."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    Place(shared / "base", named=True).enter()
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="others can exchange"):
        Place(shared / "base", named=True).enter()


def test_each_folder_that_was_refused_is_named_with_its_reason(tmp_path, monkeypatch, caplog):
    open_to_all = tmp_path / "home" / "retrieval-attn" / "numba"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    monkeypatch.setattr("numba.config.CACHE_DIR", NOWHERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", NOWHERE)
    assert code_cache.place.__wrapped__() is None
    named, unsafe, last = caplog.messages
    assert NOWHERE in named
    assert f"compiled code is not kept in {open_to_all}" in unsafe
    assert last.count(NOWHERE) == 2
    assert f"{open_to_all} is not a folder that only this user can write to" in last


def test_an_unsafe_folder_is_said_though_another_is_taken(tmp_path, monkeypatch, caplog):
    home = tmp_path / "home"
    home.mkdir()
    home.joinpath("retrieval-attn").symlink_to(tmp_path)
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba").chmod(0o777)
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert code_cache.place.__wrapped__().base.parent == tmp_path
    (message,) = caplog.messages
    assert "only this user can write to" in message


def test_a_folder_that_others_could_write_to_is_refused(tmp_path):
    own, planted, open_to_all = tmp_path / "own", tmp_path / "planted", tmp_path / "open"
    Place(own, named=False).enter()
    assert own.stat().st_mode & 0o777 == 0o700
    planted.symlink_to(own)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for folder in (planted, open_to_all):
        for named in (False, True):
            with pytest.raises(PermissionError, match="only this user can write to"):
                Place(folder, named).enter()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("named", [False, True])
def test_a_folder_of_somebody_else_is_refused(tmp_path, named):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 2000, 2000)
    with pytest.raises(PermissionError, match="only this user can write to"):
        Place(folder, named).enter()
    with pytest.raises(PermissionError, match="others can exchange"):
        Place(folder / "base", named).enter()


@pytest.fixture
def _quiet():
    """The notice of this process, which may have its second full at any time, says nothing."""
    event.unregister("numba:compile", NOTICE)
    yield
    event.register("numba:compile", NOTICE)


class Timers(list[SimpleNamespace]):
    """Timers as a notice makes them: each rings when it is started, or never."""

    def __init__(self, ring):
        self.ring = ring

    def __call__(self, seconds, say):
        self.append(SimpleNamespace(seconds=seconds, start=say if self.ring else lambda: None, cancel=self.cancelled))
        return self[-1]

    def cancelled(self):
        self[-1].was_cancelled = True


@pytest.mark.usefixtures("_quiet")
def test_compiling_is_announced_and_reading_is_not(base, caplog, monkeypatch):
    monkeypatch.setattr(compiled, "place", code_cache.place)
    timers = Timers(ring=True)
    with event.install_listener("numba:compile", CompilationNotice(timer=timers)):
        function()(2)
        function()(2.5)
        assert caplog.messages == [f"compiling CPU kernels (once; kept in {base}) ..."]
    with event.install_listener("numba:compile", CompilationNotice(timer=timers)):
        function()(2)
    assert len(caplog.messages) == len(timers) == 1
    assert timers[0].daemon


@pytest.mark.usefixtures("_quiet")
def test_quick_compilations_are_not_announced_and_add_up(base, caplog):
    timers = Timers(ring=False)
    with event.install_listener("numba:compile", CompilationNotice(patience=1000, timer=timers)):
        function()(2)
        function()(2.5)
    assert caplog.messages == []
    assert all(timer.was_cancelled for timer in timers)
    assert 0 < timers[1].seconds < timers[0].seconds == 1000


@pytest.mark.usefixtures("_quiet")
def test_where_no_thread_starts_nothing_is_announced(base):
    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    timer = SimpleNamespace(start=refuse, cancel=lambda: None)
    with event.install_listener("numba:compile", CompilationNotice(timer=lambda *arguments: timer)):
        assert function()(2) == 4


def imports_jit(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "retrieval_attn.compiled"
        and "jit" in {alias.name for alias in node.names}
        for node in nodes
    )


COMPILERS = {"njit", "jit", "vectorize", "guvectorize", "generated_jit", "stencil", "cfunc"}


def compiles(text):
    """Whether a file asks numba itself to compile, or to keep what it compiles."""
    tree = ast.parse(text)
    numbas = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.split(".")[0] == "numba"
    }
    return any(_compiles(node, numbas) for node in ast.walk(tree))


def _compiles(node, numbas):
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "numba" and bool(COMPILERS & {a.name for a in node.names})
    if isinstance(node, ast.Attribute):
        return node.attr in COMPILERS and isinstance(node.value, ast.Name) and node.value.id in numbas
    return isinstance(node, ast.keyword) and node.arg == "cache" and getattr(node.value, "value", None) is True


def test_every_file_with_compiled_code_is_in_the_digest():
    folders = [ROOT / folder for folder in ("retrieval_attn", "index", "kernels", "bench")]
    users = {path for folder in folders for path in folder.rglob("*.py") if imports_jit(path)}
    assert len(users) > 10
    assert users <= set(code_cache.sources())
    compiling = {path for folder in folders for path in folder.rglob("*.py") if compiles(path.read_text())}
    assert compiling == {ROOT / "retrieval_attn/compiled.py"}


@pytest.mark.parametrize(
    "text",
    [
        "import numba as nb\n@nb.njit\ndef f(x): return x",
        "import numba\nf = numba.vectorize(['f4(f4)'])(g)",
        "from numba import guvectorize",
        "from numba.stencils.stencil import stencil as s",
        "from numba import jit as fast",
        "@jit(cache=True)\ndef f(x): return x",
    ],
)
def test_whatever_compiles_by_itself_is_seen(text):
    assert compiles(text)


SCORE = """
import numpy as np
from retrieval_attn.index.ivf import rescore
from retrieval_attn.index.keys import Keys
keys = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
ids, scores = rescore(Keys(keys), np.ones((1, 1, 4), np.float32), np.array([[[0, 2, 1]]], np.int32), 1)
print(scores[0, 0, 0])
"""


def test_an_edit_of_a_called_function_changes_its_callers(tmp_path):
    """Numba stamps its files with the source of the caller alone: with `dot` doubled all went on as before."""
    package = tmp_path / "retrieval_attn"
    for source, target in ((ROOT / "retrieval_attn", package), (ROOT / "index", package / "index")):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    (package / "kernels").mkdir()
    (package / "kernels/__init__.py").touch()

    def score():
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [sys.executable, "-c", SCORE]
        # The current folder comes first among those that are imported from.
        return float(subprocess.run(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout)

    assert score() == 38
    dots = package / "index/loops/dots.py"
    text = dots.read_text()
    assert "    return total\n" in text
    dots.write_text(text.replace("    return total\n", "    return total + total\n"))
    assert score() == 76
    dots.write_text(text)
    assert score() == 38


# Calls a compiled function, and prints where its code went. An argument takes the place of the temporary directory.
CALL = """
import sys, tempfile
tempfile.tempdir = sys.argv[1] if len(sys.argv) > 1 else None
import numpy as np
from retrieval_attn.index.loops.topk import offer
scores, ids = np.zeros(2, np.float32), np.zeros(2, np.int32)
assert offer(scores, ids, 0, np.float32(5), 7) == 1 and ids[0] == 7
print(offer._cache.cache_path)
"""


# User 2000, who may read everything, because Python itself may lie where nobody else may look, and write nothing.
SOMEBODY = ["setpriv", "--reuid=2000", "--regid=2000", "--clear-groups"]
SOMEBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def can_be_somebody_else():
    """Whether this process may run another as user 2000."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*SOMEBODY, "true"], capture_output=True, check=False).returncode == 0


def call(*arguments, prefix=(), cwd=None, **env):
    """Run CALL without the variables that say where to keep things, except those given."""
    unset = {"HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR"}
    clean = {name: value for name, value in os.environ.items() if name not in unset} | env
    words = [*prefix, sys.executable, "-c", CALL, *arguments]
    return subprocess.run(words, env=clean, cwd=cwd, capture_output=True, text=True, check=True)


def test_the_users_cache_folder_is_taken(tmp_path):
    expected = f"{tmp_path}/retrieval-attn/numba/{code_cache.DIGEST}"
    assert call(XDG_CACHE_HOME=str(tmp_path)).stdout.strip() == expected
    assert list(Path(expected).iterdir())


def test_numba_cache_dir_comes_first(tmp_path):
    done = call(NUMBA_CACHE_DIR=str(tmp_path / "named"), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.strip() == f"{tmp_path}/named/retrieval-attn/{code_cache.DIGEST}"
    assert [path.name for path in tmp_path.iterdir()] == ["named"]


def test_a_numba_cache_dir_that_cannot_be_written_is_named(tmp_path):
    done = call(NUMBA_CACHE_DIR=NOWHERE, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.startswith(str(tmp_path))
    assert "not kept in NUMBA_CACHE_DIR" in done.stderr
    assert NOWHERE in done.stderr


def test_without_any_place_all_works_and_one_line_says_so():
    done = call(NOWHERE, HOME=NOWHERE)
    assert done.stdout.strip() == "None"
    assert done.stderr.count("set NUMBA_CACHE_DIR") == 1
    assert done.stderr.count(NOWHERE) >= 2
    assert "kept in" not in done.stderr


@pytest.mark.skipif(not can_be_somebody_else(), reason="needs root, and setpriv")
@pytest.mark.parametrize(
    "home", [{"HOME": "/nonexistent"}, *rarely({}, {"HOME": "/root"})], ids=["absent", "none", "root's"]
)
def test_a_user_without_a_home_has_a_folder_of_their_own(home):
    """Numba's own locators raise for every function then, so that nothing could be imported."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 2000, 2000)
        done = call(prefix=SOMEBODY, cwd=folder, TMPDIR=folder, **home)
        assert done.stdout.strip() == f"{folder}/retrieval-attn-2000/{code_cache.DIGEST}"
        assert os.listdir(folder) == ["retrieval-attn-2000"]
        assert "NUMBA_CACHE_DIR" not in done.stderr


# Called by two processes at once with other types; then a third finds both.
TYPES = """
import sys
import numpy as np
from retrieval_attn.index.loops.topk import worse
for name in sys.argv[1:]:
    x = np.dtype(name).type(3)
    assert worse(x, 2, x, 1)
print(sum(worse.stats.cache_misses.values()))
"""


def test_two_processes_may_compile_one_function_at_once(tmp_path):
    """Numba numbers its files: one process's list could name the file that the other wrote, for other types."""
    names = ["float32", "float64", "int32", "int64"]

    def start(*names):
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.Popen([sys.executable, "-c", TYPES, *names], env=env, stdout=subprocess.PIPE, text=True)

    both = [start(*names), start(*reversed(names))]
    assert [int(process.communicate()[0]) for process in both] != [0, 0]
    assert start(*names).communicate()[0].strip() == "0"
