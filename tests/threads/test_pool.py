"""Numba's pool leaves PyTorch's number of threads as its user set it."""

import os
import subprocess
import sys

import pytest


def n_torch_threads(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, stdout=subprocess.PIPE, check=True)
    return int(done.stdout)


@pytest.mark.skipif(os.cpu_count() == 1, reason="with one core there is one number only")
def test_starting_the_pool_leaves_what_was_set():
    code = "import torch; torch.set_num_threads(1); from retrieval_attn.threads.pool import require_safe_threads; "
    assert n_torch_threads(code + "require_safe_threads(); print(torch.get_num_threads())") == 1


# From loading to the end of an answer that read far keys.
REQUEST = """
import torch
import retrieval_attn as ra
llm = ra.load(config=ra.RetrievalConfig(index="exact", n_sink=4, n_local=16, top_k=8))
llm.generate(list(range(5, 105)), max_new_tokens=3)
print(torch.get_num_threads())
"""


@pytest.mark.long
@pytest.mark.skipif(os.cpu_count() == 1, reason="with one core there is one number only")
def test_load_and_a_first_request_leave_what_the_environment_says():
    assert n_torch_threads(REQUEST, OMP_NUM_THREADS="1") == 1
