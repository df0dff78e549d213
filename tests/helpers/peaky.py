"""Attention that is peaked, in every shape and dtype that kernels are tested in, and how exact an output must be."""

from typing import Any

import pytest
import torch

from retrieval_attn.kernels import reference

LENGTHS = [1, 63, 1000]

RATIOS = [1, 2, 4, 7]

DIMS = [8, 64, 80, 128, 256]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Of numba's kernels, which are compiled for every dtype anew; float16 differs from bfloat16 in one function.
COMPILED = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16]


def peaky(G=2, R=2, T=1, S=63, D=64, Dv=None, B=1, dtype=torch.float32):
    """Inputs whose softmax is nearly one-hot: every query holds a multiple of one key, plus noise."""
    keys, values = torch.randn(B, G, S, D), torch.randn(B, G, S, Dv or D)
    needle = torch.randint(0, S, (B, G, R * T))
    chosen = keys.gather(2, needle[..., None].expand(-1, -1, -1, D))
    query = (2 * chosen + torch.randn_like(chosen)).view(B, G * R, T, D)
    return query.to(dtype), keys.to(dtype), values.to(dtype), D**-0.5


def in_own_dtype(query, keys, values, scale, mask=None):
    """The same mathematics with every step rounded to the dtype of the inputs."""
    R = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(R, 1).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ values.repeat_interleave(R, 1), scores.logsumexp(-1)


def assert_as_exact_as_its_dtype(state, *inputs):
    """The rule of the house: at most twice the error of plain code in the same dtype, both against float64."""
    tensors: list[Any] = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    true = reference.attend_near(*tensors)
    plain_out, plain_lse = in_own_dtype(*inputs)
    assert state.out.dtype == inputs[0].dtype
    assert state.lse.dtype == torch.float32
    assert state.out.shape == true.out.shape
    alive = true.lse > -torch.inf
    assert torch.equal(state.lse > -torch.inf, alive)
    assert not state.out.isnan().any()
    assert not state.out[~alive].any()
    if alive.any():
        for ours, plain, exact in ((state.out, plain_out, true.out), (state.lse, plain_lse, true.lse)):
            allowed = 2 * (plain.double() - exact)[alive].abs().max() + float32_rounding(true)
            assert (ours.double() - exact)[alive].abs().max() <= allowed


def float32_rounding(true):
    """What another order of summation may change: a unit in the last place of a float32 score, which is about lse."""
    alive = true.lse > -torch.inf
    return 2 * torch.finfo(torch.float32).eps * (1 + true.lse[alive].abs().max()) * (1 + true.out.abs().max())
