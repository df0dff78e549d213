"""What every test stands on: no network, fixed seeds, few threads, and memory that is NaN until it is written.

`--long` runs all: the tests marked `long` too, and five times the examples of every law, other ones each time. Without
it each law is tried on the same examples every time.
"""

import os

# Before any import that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait by spinning cost tiny tensors 12 to 25 times the processor time that the work needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton decides when it is imported whether kernels, its own library's among them, are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

import itertools
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# What many tests need of compiled code, what others call first.
COMPILED = [
    *itertools.product(("float32",), ("exact", "graph", "far", "scan", "page")),
    *itertools.product(("uint16",), ("exact", "graph", "far", "scan")),
    *itertools.product(("int8",), ("exact", "far", "scan")),
]

LEFT_OUT = "left to `make test-long`"

settings.register_profile("short", max_examples=100, deadline=None, database=None, derandomize=True)
settings.register_profile("long", max_examples=500, deadline=None, database=None, print_blob=True)

# One: `make test` keeps every core busy with processes. numba's loops keep their threads.
torch.set_num_threads(1)

# A device context remembers torch's own allocators at its first use; let it see them before they are wrapped.
with torch.device("cpu"):
    torch.empty(0)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long, and five times the examples")


def pytest_configure(config):
    settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_sessionstart(session):
    """Compile for each other before any test begins; two processes at one kind's tests would both compile the same."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        return
    claims = claims_of(worker["testrunuid"])
    claims.mkdir(exist_ok=True)
    for dtype, what in COMPILED:
        try:
            (claims / f"{what}-{dtype}").touch(exist_ok=False)
        except FileExistsError:
            continue
        compile_ahead(what, np.dtype(dtype))


def pytest_sessionfinish(session):
    workers = session.config.pluginmanager.getplugin("dsession")
    if workers is not None:
        shutil.rmtree(claims_of(workers.nodemanager.testrunuid), ignore_errors=True)


def claims_of(run):
    """The folder where the processes of a run say what they compile."""
    return Path(tempfile.gettempdir()) / f"retrieval-attn-tests-{run}"


def compile_ahead(what, dtype):
    from retrieval_attn.index import prepare
    from retrieval_attn.kernels import attend_far

    if what != "far":
        return prepare(what, dtype)
    keys = np.zeros((1, 1, 16), dtype)
    attend_far(torch.zeros(1, 1, 1, 16), keys, keys, np.zeros((1, 1, 1), np.int32), 1.0)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long") or config.getoption("-m"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=LEFT_OUT))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    n = sum(LEFT_OUT in str(report.longrepr) for report in skipped)
    if n:
        terminalreporter.write_line(f"{n} tests are {LEFT_OUT}, which also tries five times the examples of every law")


@pytest.fixture(autouse=True)
def _seeds():
    """The same random numbers in every test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch):
    """Fill what `torch.empty` and its kin return with NaN, so that an output not fully written shows.

    PyTorch's own switch for this needs deterministic algorithms, which change the very kernels under test. NumPy's
    allocators stay as they are: compiled code looks them up by identity.
    """

    def filled(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() and not x.is_meta else x

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
