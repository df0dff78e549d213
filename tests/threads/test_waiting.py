"""Threads sleep between parallel loops, unless the user has said how they wait."""

import os
import re
import subprocess
import sys

import numba
import pytest

from retrieval_attn import cli
from retrieval_attn.threads.pool import require_safe_threads
from retrieval_attn.threads.waiting import LIBRARIES, USERS_OWN, let_threads_sleep


@pytest.fixture
def unsaid(monkeypatch):
    """An environment that does not say how threads wait; as it was before, afterwards."""
    for name in USERS_OWN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("unsaid")
def test_threads_sleep_unless_told_otherwise(caplog, monkeypatch):
    for module in LIBRARIES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert caplog.messages == []


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("late", [("torch",), ("faiss",), ("numba's pool of threads",), tuple(LIBRARIES)])
def test_what_comes_too_late_is_said_once(caplog, monkeypatch, late):
    names = [name for name in LIBRARIES if name in late]
    for name, module in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, module, object())
        if name not in names:
            monkeypatch.delitem(sys.modules, module)
    let_threads_sleep()
    let_threads_sleep()
    (message,) = caplog.messages
    assert f"retrieval_attn.load was imported after {' and '.join(names)}, whose" in message


@pytest.mark.usefixtures("unsaid")
def test_the_modules_are_those_that_load_the_libraries():
    require_safe_threads()
    layers = {"omp": {"numba.np.ufunc.omppool"}, "tbb": set()}
    assert layers[numba.threading_layer()] <= {*LIBRARIES.values()} & {*sys.modules}


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("name", USERS_OWN)
def test_what_the_user_said_stays(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    let_threads_sleep()
    assert {n: os.environ.get(n) for n in USERS_OWN} == dict.fromkeys(USERS_OWN) | {name: "7"}


@pytest.mark.usefixtures("unsaid")
def test_the_command_line_says_it(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda args: None)
    with pytest.raises(SystemExit):
        cli.main([])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def spins(code, **env):
    """How often each OpenMP library that `code` loads looks whether there is work, in the order they are loaded."""
    clean = {name: value for name, value in os.environ.items() if name not in USERS_OWN}
    env = clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True, check=True)
    return [int(n) for n in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)]


POOL = "from retrieval_attn.threads.pool import require_safe_threads; require_safe_threads()"


def test_no_library_spins_once_load_is_asked_for():
    found = spins(f"import retrieval_attn as ra; ra.load; {POOL}; import faiss")
    assert len(found) >= 2
    assert set(found) == {0}


@pytest.mark.long
def test_a_library_that_was_loaded_before_goes_on():
    """What cannot be had: there is no call that changes how threads wait."""
    before, *after = spins(f"import torch; import retrieval_attn as ra; ra.load; {POOL}; import faiss")
    assert before > 0
    assert set(after) == {0}


def test_a_bare_import_says_nothing():
    code = "import os; before = dict(os.environ); import retrieval_attn, retrieval_attn.index, retrieval_attn.kernels; "
    done = subprocess.run([sys.executable, "-c", code + "print(dict(os.environ) == before)"], stdout=subprocess.PIPE)
    assert done.stdout == b"True\n"
