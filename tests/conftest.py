"""What every test stands on: no network, fixed seeds, two threads, and memory that is NaN until it is written."""

import os

# Before any import that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides when it is imported whether kernels, its own library's among them, are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random

import numpy as np
import pytest
import torch

N_THREADS = 2

torch.set_num_threads(min(N_THREADS, os.cpu_count() or 1))

# A device context remembers torch's own allocators at its first use; let it see them before they are wrapped.
with torch.device("cpu"):
    torch.empty(0)


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
