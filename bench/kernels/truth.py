"""Exact attention of a few queries of a chunk, and what an output must obey to be attention at all."""

from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.bench.kernels.methods import Chunk, Result

# Queries of a chunk that outputs are compared for.
N_ROWS = 32

# What rounding to the dtype may add, relative to the largest value; unit roundoff times a small factor.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


class Truth(NamedTuple):
    """rows (n,) of the chunk; their out (H, n, D) and lse (H, n) in float32; longest (H,), length of the longest
    value."""

    rows: Tensor
    out: Tensor
    lse: Tensor
    longest: Tensor


class Verdict(NamedTuple):
    """squared: of the distances from the truth, and of the truth. mass: share of it that was read, None if not told.
    problem: why the output cannot be right, if it cannot."""

    squared: tuple[float, float]
    mass: float | None
    problem: str | None


def truth_of(chunk: Chunk) -> Truth:
    """In float32, of queries spread evenly over the chunk, a KV head at a time."""
    query, keys, values = (x[0] for x in chunk)
    (H, T, _), (G, S, _) = query.shape, keys.shape
    rows = torch.linspace(0, T - 1, min(T, N_ROWS), device=query.device).long()
    future = torch.arange(S, device=query.device) > rows[:, None] + (S - T)
    outs, lses, longest = [], [], []
    for g in range(G):
        asked = query[g * H // G : (g + 1) * H // G, rows].float()
        scores = (asked @ keys[g].float().T * chunk.scale).masked_fill_(future, -torch.inf)
        outs.append(scores.softmax(-1) @ values[g].float())
        lses.append(scores.logsumexp(-1))
        longest.append(values[g].float().norm(dim=1).amax().expand(H // G))
    return Truth(rows, torch.cat(outs), torch.cat(lses), torch.cat(longest))


def judge(result: Result, truth: Truth) -> Verdict:
    """Compare with exact attention.

    Leaving out a share of the mass moves the output by at most that share times the distance between what was read and
    what was not. What moves further is no attention over some of the keys, whatever it left out.
    """
    out = result.out[0, :, truth.rows].float()
    distance = (out - truth.out).norm(dim=2)
    squared = float(distance.square().sum()), float(truth.out.square().sum())
    slack = TOLERANCE[result.out.dtype]
    if not bool(torch.isfinite(out).all()):
        return Verdict((squared[1], squared[1]), None, "the output is not finite")
    if result.lse is None:
        mass = torch.ones_like(truth.lse)
    else:
        mass = torch.exp(result.lse[0, :, truth.rows].float() - truth.lse)
    longest = truth.longest[:, None]
    allowed = (1 - mass).clamp_min(0) * (out.norm(dim=2) + longest) + slack * longest
    problem = None
    if not bool((mass <= 1 + slack).all()):
        problem = f"the softmax denominator is {float(mass.max()):.4f} of the whole one"
    elif bool((distance > allowed).any()):
        worst = float((distance / allowed).max())
        problem = f"the output is {worst:.1f} times as far from exact attention as the mass left out allows"
    return Verdict(squared, None if result.lse is None else float(mass.mean()), problem)
