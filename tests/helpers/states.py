"""States of attention, and when two are the same."""

import math

import torch

from retrieval_attn.kernels import AttentionState

SHAPE = (1, 4, 3, 8)

GAPS = [0.0, 1.0, 200.0, -200.0, 1e4, -1e4, math.inf, -math.inf]


def state(lse=0.0, seed=0, dtype=torch.float32, shape=SHAPE):
    out = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if lse == -math.inf:
        return AttentionState.empty(shape, dtype)
    return AttentionState(out, torch.full(shape[:-1], float(lse)))


def wide(s):
    return AttentionState(s.out.double(), s.lse.double())


def assert_same(a, b):
    """Equal within rounding: an lse of 10,000 is only known to a thousandth, and so are the weights it gives."""
    lse = torch.cat([a.lse, b.lse]).abs()
    largest = lse[lse.isfinite()].max().item() if lse.isfinite().any() else 0.0
    unit = torch.finfo(torch.float32).eps
    torch.testing.assert_close(a.lse, b.lse, rtol=0, atol=4 * unit * (1 + largest))
    torch.testing.assert_close(a.out, b.out, rtol=0, atol=8 * unit * (1 + largest))
