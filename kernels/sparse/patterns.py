"""The three patterns of sparse prefill (MInference, arXiv 2407.02490, section 3.2) as lists of keys, with fixed sizes.

"a_shape": the first tokens and the last ones. "vertical_slash": columns and diagonals of the attention matrix, seen in
the exact attention of the last queries. "block_sparse": blocks whose mean key looks best to the run's mean query.
What they list, they list for all runs of one call: the newest queries speak for those before them, so a long prompt is
done in chunks. choose.py chooses sizes, and the pattern, by what a sample of the queries attends to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.sparse.coverage import Coverage, Layout, list_blocks, list_coverage
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.probes import N_FIRST, N_NEAR, attend_probes, sum_diagonals

KINDS = ("a_shape", "vertical_slash", "block_sparse", "dense")

# Queries that an estimate of columns and diagonals looks at; the paper's 64, the last ones.
N_PROBES = 64

# Always read by "vertical_slash": the first tokens, and the nearest diagonals, in tokens.
FIRST_COLUMNS, NEAREST_SLASHES = 30, 100


class HeadPattern(NamedTuple):
    """How one query head attends during prefill.

    kind: one of `KINDS`. vertical, slash: of "a_shape" the first and the last tokens that are read; of "vertical_slash"
    how many columns and how many diagonals; of "block_sparse" how many blocks of 64 keys, with those it must read.
    """

    kind: str
    vertical: int = 0
    slash: int = 0


# The paper's sizes: a budget of 1024 + 4096 keys.
DEFAULT_SIZES = {
    "a_shape": HeadPattern("a_shape", 1024, 4096),
    "vertical_slash": HeadPattern("vertical_slash", 1000, 6096),
    "block_sparse": HeadPattern("block_sparse", 100),
    "dense": HeadPattern("dense"),
}


def check_patterns(patterns: Sequence[HeadPattern], n_heads: int) -> None:
    """Raises ValueError unless there is one pattern per head, of a known kind and sizes of at least 0."""
    if len(patterns) != n_heads:
        raise ValueError(f"there must be one pattern per query head ({n_heads}), got {len(patterns)}")
    for head, pattern in enumerate(patterns):
        if pattern.kind not in KINDS:
            raise ValueError(f"head {head}: kind must be one of {', '.join(KINDS)}, got {pattern.kind!r}")
        if pattern.vertical < 0 or pattern.slash < 0:
            raise ValueError(f"head {head}: sizes must be at least 0, got {pattern.vertical} and {pattern.slash}")


def fixed_index(query: Tensor, keys: Tensor, scale: float, pattern: HeadPattern, layout: Layout) -> SparseIndex:
    """What heads of one pattern read. query: (h, T, D); keys: (g, S, D); KV head of query head i is i // (h // g)."""
    if pattern.kind == "a_shape":
        return list_coverage(a_shape(pattern, len(query), layout, query.device), layout)
    if pattern.kind == "vertical_slash":
        return list_coverage(vertical_slash(query, keys, scale, pattern, layout), layout)
    return list_blocks(block_sparse(query, keys, scale, pattern.vertical, layout), layout)


def a_shape(pattern: HeadPattern, n_heads: int, layout: Layout, device: torch.device | str = "cpu") -> Coverage:
    """The first `vertical` tokens, and at least the last `slash` tokens before each query."""
    diagonals = torch.zeros((n_heads, layout.n_blocks), dtype=torch.bool, device=device)
    diagonals[:, : 1 + -(-pattern.slash // layout.width)] = True
    columns = torch.arange(min(pattern.vertical, layout.S), device=device)
    return Coverage(diagonals, columns.expand(n_heads, -1))


def vertical_slash(query: Tensor, keys: Tensor, scale: float, pattern: HeadPattern, layout: Layout) -> Coverage:
    """The columns and diagonals that hold most of the attention of the last 64 queries, and the nearest of both.

    A diagonal is read as the one or two blocks of diagonals that hold it.
    """
    probes = attend_probes(query, keys, scale, torch.arange(max(0, layout.T - N_PROBES), layout.T, device=query.device))
    columns, slashes = probes.sum(1), sum_diagonals(probes)
    columns[:, :FIRST_COLUMNS] = torch.inf
    slashes[:, :NEAREST_SLASHES] = torch.inf
    n_columns = min(max(pattern.vertical, FIRST_COLUMNS), layout.S)
    n_slashes = min(max(pattern.slash, NEAREST_SLASHES), layout.S)
    chosen = columns.topk(n_columns, dim=1).indices.sort(dim=1).values
    distances = slashes.topk(n_slashes, dim=1).indices
    return Coverage(blocks_at(distances, layout), chosen)


def block_sparse(query: Tensor, keys: Tensor, scale: float, n_best: int, layout: Layout) -> Tensor:
    """(h, N, blocks) bool: for each run the `n_best` that look best in the mean, those that it must read first."""
    scores = score_blocks(query, keys, scale, layout)
    return best_blocks(scores, torch.full((len(scores),), n_best, device=query.device), layout)


def best_blocks(scores: Tensor, n_best: Tensor, layout: Layout) -> Tensor:
    """(h, N, blocks) bool: the n_best (h,) blocks of each run by `scores`, and in any case those that it must read."""
    rank = scores.argsort(dim=2, descending=True).argsort(dim=2)
    return (rank < n_best[:, None, None]) & (scores > -torch.inf) | (scores == torch.inf)


def blocks_at(distances: Tensor, layout: Layout) -> Tensor:
    """(h, distances in blocks) bool: the blocks of diagonals that hold the distances (h, n) in tokens."""
    diagonals = torch.zeros((len(distances), layout.n_blocks + 1), dtype=torch.bool, device=distances.device)
    # Queries of a block that look `distance` back look into two blocks, unless it is a whole number of blocks.
    for blocks in (distances // layout.width, (distances + layout.width - 1) // layout.width):
        diagonals.scatter_(1, blocks.clamp_max(layout.n_blocks), True)
    return diagonals[:, : layout.n_blocks]


def score_blocks(query: Tensor, keys: Tensor, scale: float, layout: Layout) -> Tensor:
    """(h, N, blocks) float32: how the mean query of each run likes the mean key of each block.

    Infinite for blocks that must be read: the run's own, the one before it, and those of the first 64 keys; -inf for
    blocks that the run does not see.
    """
    queries = _means(query, 0, layout.rows)
    centres = _means(keys, -layout.first_key, layout.width).repeat_interleave(len(query) // len(keys), dim=0)
    block = torch.arange(centres.shape[1], device=keys.device)
    span = layout.rows // layout.width
    own = layout.n_before + span * torch.arange(queries.shape[1], device=keys.device)[:, None]
    scores = (queries * scale) @ centres.mT
    first = layout.first_key + block * layout.width < N_FIRST
    scores.masked_fill_((block >= own - N_NEAR) | first, torch.inf)
    return scores.masked_fill_(block >= own + span, -torch.inf)


def _means(x: Tensor, n_missing: int, size: int) -> Tensor:
    """(h, blocks, D) float32 means of runs of `size` rows of (h, n, D), before which n_missing rows are wanting."""
    h, n, D = x.shape
    n_after = -(n + n_missing) % size
    if n_missing == n_after == 0:
        return x.float().reshape(h, -1, size, D).mean(2)
    sums = torch.nn.functional.pad(x.float(), (0, 0, n_missing, n_after)).view(h, -1, size, D).sum(2)
    counts = torch.nn.functional.pad(x.new_ones(n, dtype=torch.float32), (n_missing, n_after)).view(-1, size).sum(1)
    return sums / counts[:, None]
