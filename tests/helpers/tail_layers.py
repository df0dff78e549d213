"""Layers of which a tail can be estimated, and how far an output is from another."""

import math

import torch


def layer(S=4096, G=2, R=2, D=32, T=3, seed=0, sharp=2.0):
    """Keys whose mean wanders and whose values go with them; queries for which some keys count far more than others."""
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=make)  # noqa: E731
    wander = torch.cumsum(randn(G, S, D), 1) / math.sqrt(S)
    keys = wander + randn(G, S, D)
    values = keys @ randn(D, D) / math.sqrt(D) + randn(G, S, D)
    return sharp * randn(1, G * R, T, D), keys, values, D**-0.5


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
