"""Some queries of a call, attended exactly: what they look at is what the patterns are made from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.sparse.coverage import Layout

# Always read: the first tokens, and the nearest blocks of diagonals beside a query's own.
N_FIRST, N_NEAR = 64, 1

# Which probes say what to read, and which the budget must hold for.
FIT, CHECK = slice(0, None, 2), slice(1, None, 2)

# Places at which probes stand vary with it: its multiples lie nowhere close together.
GOLDEN = (math.sqrt(5) - 1) / 2

# One query in so many is a probe.
PROBE_EVERY, MOST_PROBES = 32, 64


class Seen(NamedTuple):
    """What n probes of h heads attend to, beside what is always read.

    probes: (h, n, S) mass, zero where it is always read. blocks: (h, n, blocks), the same in blocks of keys. missing:
    (h, n), all of it. best: (h, n) the most that any key has. rows: (n,) which queries the probes are; runs, own: the
    run and the block of each. visible: keys that a probe sees, in the mean.
    """

    probes: Tensor
    best: Tensor
    blocks: Tensor
    missing: Tensor
    rows: Tensor
    runs: Tensor
    own: Tensor
    visible: float


def look(query: Tensor, keys: Tensor, scale: float, layout: Layout, scratch: Tensor | None = None) -> Seen:
    """Attend with a sample of the queries (h, T, D), evenly spread, to keys (g, S, D); scratch: of `attend_probes`."""
    T, width = layout.T, layout.width
    rows = probe_rows(T, n_probes(T), width, query.device)
    probes = attend_probes(query, keys, scale, rows, scratch)
    best = probes.amax(2)
    own = layout.n_before + rows // width
    near = layout.first_key + (own - N_NEAR) * width
    first = max(0, int(near.min()))
    position = torch.arange(first, layout.S, device=query.device)
    probes[:, :, first:].masked_fill_(position >= near[:, None], 0)
    probes[:, :, :N_FIRST] = 0
    blocks = sum_blocks(probes, layout)
    visible = layout.past + float(rows.float().mean()) + 1
    return Seen(probes, best, blocks, blocks.sum(2), rows, rows // layout.rows, own, visible)


def n_probes(T: int) -> int:
    """How many of T queries are looked at."""
    return max(2, min(MOST_PROBES, T // PROBE_EVERY))


def sum_blocks(probes: Tensor, layout: Layout) -> Tensor:
    """(h, n, blocks) from (h, n, S): sums over the blocks of keys, of which the first and the last may be cut."""
    start = layout.first_key + layout.width if layout.first_key else 0
    start = min(start, layout.S)
    stop = start + (layout.S - start) // layout.width * layout.width
    whole = probes[:, :, start:stop].unflatten(2, (-1, layout.width)).sum(3) if stop > start else None
    ends = [probes[:, :, part].sum(2, keepdim=True) for part in (slice(0, start), slice(stop, layout.S))]
    parts = [ends[0] if start else None, whole, ends[1] if stop < layout.S else None]
    return torch.cat([part for part in parts if part is not None], dim=2)


def probe_rows(T: int, n: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(n,) two queries in each of n / 2 stretches of T: one that says what to read, and one that checks.

    The first stand by turns near the first and the last place of their block, where one diagonal of keys lies in two
    blocks of diagonals; the others stand anywhere.
    """
    pair = torch.arange((n + 1) // 2, device=device, dtype=torch.float64)
    size = T / len(pair)
    blocks = (pair * size).long() // width * width
    rows = torch.empty(n, dtype=torch.long, device=device)
    rows[FIT] = (blocks + torch.where(pair % 2 == 0, min(2, width - 1), max(0, width - 3))).clamp_max(T - 1)
    rows[CHECK] = ((pair + (pair * GOLDEN) % 1) * size).long()[: n // 2]
    return rows


def attend_probes(query: Tensor, keys: Tensor, scale: float, rows: Tensor, scratch: Tensor | None = None) -> Tensor:
    """(h, n, S) float32: the exact causal softmax of the queries at `rows` of (h, T, D) over keys (g, S, D).

    scratch: memory of at least so many numbers to write it to. Fresh memory costs more than the arithmetic.
    """
    (g, S, D), (h, T) = keys.shape, query.shape[:2]
    folded = (query[:, rows].float() * scale).reshape(g, -1, D)
    size = (g, folded.shape[1], S)
    room = keys.new_empty(size, dtype=torch.float32) if scratch is None else scratch[: math.prod(size)].view(size)
    scores = torch.bmm(folded, keys.float().mT, out=room).view(h, -1, S)
    position = torch.arange(T, device=keys.device)
    scores[:, :, S - T :].masked_fill_(position > rows[:, None], -torch.inf)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def sum_diagonals(probes: Tensor) -> Tensor:
    """(h, S): of consecutive queries, the last of which is at S - 1, the sum at each distance from the query."""
    h, n, S = probes.shape
    # Each row is written one place further left than the one below it: diagonals become columns.
    skewed = probes.new_zeros((h, n * (S + n)))
    skewed.as_strided((h, n, S), (n * (S + n), S + n - 1, 1), n - 1).copy_(probes)
    return skewed.view(h, n, S + n).sum(1)[:, :S].flip(1)
