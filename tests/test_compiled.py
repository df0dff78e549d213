"""How CPU code sees tensors, and which thread pools it refuses."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from retrieval_attn.arrays import as_array, as_float32, as_stored
from retrieval_attn.compiled import as_float, jit
from retrieval_attn.threads.pool import require_safe_threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_seen_not_copied(dtype):
    x = torch.randn(4, 5).to(dtype)
    array = as_array(x)
    assert array.ctypes.data == x.data_ptr()
    assert np.array_equal(as_float32(array), x.float().numpy())


@jit()
def _sum(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += as_float(x[i])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_code_reads_every_dtype_in_place(dtype):
    x = torch.tensor([1.5, -2.0, 0.25, 6.1e-5, 1024.0]).to(dtype)
    assert _sum(as_stored(as_array(x))) == pytest.approx(float(x.float().sum()))


def test_as_float_keeps_nan_and_infinity():
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float16, torch.bfloat16):
            assert np.array_equal(_sum(as_stored(as_array(torch.tensor([value]).to(dtype)))), value, equal_nan=True)


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="keys must be a NumPy array or a torch tensor, got list"):
        as_array([1, 2], "keys")
    with pytest.raises(ValueError, match="keys must be in CPU memory, got a tensor on meta"):
        as_array(torch.empty(3, device="meta"), "keys")


def test_the_thread_layer_that_aborts_is_refused():
    code = "from retrieval_attn.threads.pool import require_safe_threads; require_safe_threads()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_THREADING_LAYER": "workqueue"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "threading layer must be 'omp' or 'tbb', got 'workqueue'" in done.stderr


def test_two_threads_may_enter_parallel_kernels_at_once():
    """The builder and the decoder do; under `workqueue` this would abort the process."""
    from retrieval_attn.index import build_index

    require_safe_threads()
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 4000, 32), dtype=np.float32)
    queries = rng.standard_normal((4, 64, 32), dtype=np.float32)
    index = build_index("exact", keys)
    expected = index.search(queries, 10).ids
    builder = threading.Thread(target=lambda: build_index("graph", keys, queries))
    builder.start()
    found = [index.search(queries, 10).ids for _ in range(200)]
    builder.join()
    assert all(np.array_equal(ids, expected) for ids in found)
