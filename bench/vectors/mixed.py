"""A whole prompt as a large model's layers attend to it: every head shares its attention among six things.

Published patterns of prefill (MInference, arXiv 2407.02490): nearly all heads look at a few columns and a few
diagonals, "vertical-slash"; a few at the first tokens and the last ones alone, "A-shape"; a few at scattered blocks.
How much of its mass a head gives to which was not published: the shares in `MIXES` are ours, and so are the sizes.

Keys carry marks beside their content, each in dimensions of its own, and queries ask for marks more or less strongly;
all mass comes from inner products. How strongly, as a line in the logarithm of the position, is fitted by head to what
a few queries' exact attention then looks like.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.bench.vectors.base import check_shape
from retrieval_attn.bench.vectors.marks import LOCAL, N_MARKED, N_SINK, PARTS, Head, Sizes, Text, part_of, part_scores
from retrieval_attn.bench.vectors.shaped import shaped


class Mix(NamedTuple):
    """heads: share of the heads that are such. The rest: shares of a query's mass, in the mean. retrieval: as in
    `shaped.shaped`, an earlier token that no pattern tells."""

    heads: float
    sink: float
    local: float
    vertical: float
    slash: float
    topic: float
    retrieval: float


# The best 4096 keys of a long prompt are reported to hold about 0.96 of the mass; so in most heads little is left to
# retrieval, which no pattern can follow.
MIXES = {
    "vertical_slash": Mix(0.91, 0.37, 0.29, 0.18, 0.11, 0.02, 0.03),
    "a_shape": Mix(0.03, 0.55, 0.41, 0.01, 0.01, 0.01, 0.01),
    "block_sparse": Mix(0.03, 0.20, 0.20, 0.05, 0.02, 0.48, 0.05),
    "retrieval": Mix(0.03, 0.15, 0.10, 0.05, 0.02, 0.03, 0.65),
}

# Standard deviation of the logarithm of a head's shares around those of its kind.
_SPREAD = 0.2

# How long the values of sinks are beside others.
_SINK_VALUE = 0.1

# Added to the seed, so that marks are not drawn from the numbers that content was drawn from.
_OTHER = 1_000_003

# Queries that a head is fitted to, stretches of the text that they are averaged over, and rounds of fitting.
_PROBES, _STRETCHES, _ROUNDS = 128, 4, 8


class Mixed(NamedTuple):
    """query (1, H, S, D), keys and values (1, G, S, D); `heads`, what was asked of each query head."""

    query: Tensor
    keys: Tensor
    values: Tensor
    heads: list[Head]


def mixed(S: int, H: int, G: int, D: int, seed: int, dtype: torch.dtype) -> Mixed:
    """H query heads over G KV heads of dimension D (a multiple of 32, 64 at least) over S tokens.

    The same arguments give the same vectors. Raises ValueError for shapes that no layer has.
    """
    check_shape(S, H, G, D, 1, 1)
    if D % 32 or D < 64:
        raise ValueError(f"D must be a multiple of 32, and at least 64, for mixed heads, got {D}")
    sizes = Sizes.of(D)
    make = torch.Generator().manual_seed(seed + _OTHER)
    said = shaped(S, H, G, sizes.content, S, 1, seed, torch.float32)
    query, keys = torch.zeros((1, H, S, D), dtype=dtype), torch.zeros((1, G, S, D), dtype=dtype)
    values = torch.empty((1, G, S, D), dtype=dtype)
    kinds = _draw_kinds(H, make)
    heads = []
    for g in range(G):
        text = Text(S, make)
        text.mark(keys[0, g], said.keys[g], sizes, make)
        values[0, g] = _spread_out(said.values[g], D, make)
        marked = keys[0, g].float()
        for h in range(g * H // G, (g + 1) * H // G):
            head = text.draw_head(kinds[h], _draw_mix(kinds[h], make), make)
            asked = text.ask(head, said.prefill_queries[h], sizes, D)
            query[0, h] = _fit(head, text, asked, marked, sizes)
            heads.append(head)
    return Mixed(query, keys, values, heads)


def _fit(head: Head, text: Text, asked: Tensor, keys: Tensor, sizes: Sizes) -> Tensor:
    """The queries (S, D) with each part as strong as makes its share of the mass what it is to be.

    The strength of a part is a line in the logarithm of the position; it grows where the probes give the part too
    little mass and shrinks where too much.
    """
    S, D = asked.shape
    positions = torch.linspace(min(S - 1, LOCAL), S - 1, _PROBES).long()
    part = part_of(head, text, positions)
    future = torch.arange(S) > positions[:, None]
    scores = torch.stack(part_scores(asked[positions], keys, sizes)) * D**-0.5
    wanted = torch.tensor(head.mix)
    line = torch.stack([torch.ones(S), torch.log2(torch.arange(S) + 1.0) - math.log2(S)])
    middles = positions.view(_STRETCHES, -1)[:, _PROBES // _STRETCHES // 2]
    solve = torch.linalg.pinv(line[:, middles].T)  # [2, stretches]
    weights = torch.zeros((N_MARKED, 2))
    for _ in range(_ROUNDS):
        strength = weights @ line[:, positions]
        found = scores[0] + torch.einsum("pn,pns->ns", strength, scores[1:])
        mass = found.masked_fill_(future, -torch.inf).softmax(1)
        shares = torch.zeros((_PROBES, len(PARTS))).scatter_add_(1, part, mass)
        shares = shares.view(_STRETCHES, -1, len(PARTS)).mean(1).clamp_min_(1e-4)
        lack = (wanted / shares).log()
        # Relative to retrieval, whose strength is given.
        weights += (solve @ (lack[:, :-1] - lack[:, -1:])).T
    strength = weights @ line
    _, marks, topic, local, slash = sizes.split(asked)
    marks[:, :1] *= strength[0][:, None]
    marks[:, 1:] *= strength[2][:, None]
    for x, i in ((local, 1), (slash, 3), (topic, 4)):
        x *= strength[i][:, None]
    return asked


def _draw_kinds(H: int, make: torch.Generator) -> list[str]:
    """A kind per head: as many as `MIXES` says, what is left of a head by lot, in random order."""
    names = list(MIXES)
    exact = H * torch.tensor([MIXES[name].heads for name in names])
    whole = exact.floor().long()
    left = H - int(whole.sum())
    if left:
        whole += torch.bincount(torch.multinomial(exact - whole, left, generator=make), minlength=len(names))
    kinds = [name for name, n in zip(names, whole.tolist(), strict=True) for _ in range(n)]
    return [kinds[i] for i in torch.randperm(H, generator=make)]


def _draw_mix(kind: str, make: torch.Generator) -> tuple[float, ...]:
    """Shares near those of the kind, which add up to 1."""
    shares = torch.tensor(MIXES[kind][1:]) * torch.exp(_SPREAD * torch.randn(len(PARTS), generator=make))
    return tuple((shares / shares.sum()).tolist())


def _spread_out(values: Tensor, D: int, make: torch.Generator) -> Tensor:
    """(S, D) of the meanings in (S, any), and what is particular about each token; sinks have little to say."""
    n = values.shape[1]
    out = torch.randn((len(values), D), generator=make).mul_(0.5)
    out.addmm_(values, torch.randn((n, D), generator=make) / math.sqrt(n))
    out[:N_SINK] *= _SINK_VALUE
    return out
