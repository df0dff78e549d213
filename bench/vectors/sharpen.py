"""How sharply made-up queries ask, and from how far outside the keys' distribution."""

import math

import torch
from torch import Tensor

from retrieval_attn.bench.vectors.base import Spread

# Softmax mass that the best 100 keys of a query hold on average; the paper reports 89 % for 1000 of 100,000, the
# embedded model has 65 to 96 %, by layer.
TOP_MASS = 0.9

# Distance of queries from the keys, in the keys' own standard deviations, over that of the keys themselves. The paper
# reports over 10 for large models; the embedded model has 2 to 4.
DISTANCE_RATIO = 7.0

_TOP = 100

# Queries and keys that calibration looks at.
_PROBES, _STRIDE = 24, 8


def sharpen(queries: Tensor, keys: Tensor, spread: Spread, make: torch.Generator) -> Tensor:
    """Queries (T, D) with the temperature that their head has, moved away from the keys where keys hardly vary.

    keys (S, D), of which `spread` speaks. The best 100 keys (a tenth, if there are fewer than 1000) then hold
    `TOP_MASS` of the softmax at scale D ** -0.5, and queries are about `DISTANCE_RATIO` times as far out as keys.
    """
    away = _displacement(queries.shape[1], spread, make, len(queries))
    # The two depend on each other; a sample of the keys is enough to get near, the last step is exact.
    some = keys[:: max(1, len(keys) // 16384)]
    moved = queries
    for _ in range(8):
        queries = queries * _temperature(moved, some, len(keys))
        moved = queries + away * _distance_to_go(queries, away, spread)
    return moved * _temperature(moved, keys, len(keys))


def _displacement(D: int, spread: Spread, make: torch.Generator, n: int) -> Tensor:
    """(n, D): one direction for the head and a little of its own for each query, among the flattest quarter."""
    flat = spread.axes[:, : D // 4]
    together = torch.randn((1, D // 4), generator=make) + 0.5 * torch.randn((n, D // 4), generator=make)
    return together @ flat.T / math.sqrt(D // 4)


def _distance_to_go(queries: Tensor, away: Tensor, spread: Spread) -> float:
    """The m for which queries + m * away have the distance wanted, in the mean square; 0 if they have it already."""
    some = torch.linspace(0, len(queries) - 1, min(len(queries), 128)).long()
    here, step = spread.whitened(queries[some]), (away[some] @ spread.axes) / spread.values.sqrt()
    a = step.square().sum(1).mean()
    b = (here * step).sum(1).mean()
    c = here.square().sum(1).mean() - (DISTANCE_RATIO * spread.own) ** 2
    return float((-b + (b * b - a * c).clamp_min(0).sqrt()) / a) if c < 0 else 0.0


def _temperature(queries: Tensor, keys: Tensor, n_keys: int) -> float:
    """The factor by which queries must grow so that their best keys hold `TOP_MASS`; by bisection on its logarithm.

    keys: all `n_keys` of them, or an even sample. The best ones are looked at all, of the rest every eighth.
    """
    probes = queries[torch.linspace(0, len(queries) - 1, min(len(queries), _PROBES)).long()]
    scores = probes @ keys.T * keys.shape[1] ** -0.5
    n_top = max(1, _n_top(n_keys) * len(keys) // n_keys)
    best = scores.topk(n_top, dim=1).values
    stride = _STRIDE if len(keys) > 512 * _STRIDE else 1
    sample = scores[:, ::stride]
    rest = torch.where(sample < best[:, -1:], sample, -torch.inf) - best[:, :1]
    best = best - best[:, :1]
    low, high = -6.0, 6.0
    for _ in range(16):
        middle = (low + high) / 2
        factor = math.exp(middle)
        top = (best * factor).exp().sum(1)
        mass = (top / (top + stride * (rest * factor).exp().sum(1))).mean()
        low, high = (middle, high) if mass < TOP_MASS else (low, middle)
    return math.exp(low)


def _n_top(S: int) -> int:
    return min(_TOP, max(1, S // 10))
