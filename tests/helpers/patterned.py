"""Attention by patterns, made to be found."""

import torch
from hypothesis import strategies as st

RATIOS = [1, 2, 4]

SIZES = {
    "T": st.integers(1, 300),
    "past": st.integers(0, 300),
    "R": st.sampled_from(RATIOS),
    "seed": st.integers(0, 999),
}


def made(T, S, R, seed, D=16):
    make = torch.Generator().manual_seed(seed)
    return torch.randn((2 * R, T, D), generator=make), torch.randn((2, S, D), generator=make)
