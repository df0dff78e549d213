"""From what heads read, the same for every run of queries, to the lists that the kernel wants.

A vertical is a column of the attention matrix: a key that all queries read. A slash is a diagonal: a distance that all
queries read at. Diagonals are kept in blocks of `width`, counted from the run's own block: whatever run it is, it
reads the same blocks relative to itself, so one list per head serves all runs and nothing is sorted run by run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.sparse.lists import SparseIndex

# What is written where a list has no more keys; the kernels never look there.
NOWHERE = torch.iinfo(torch.int32).max


class Layout(NamedTuple):
    """How T queries, the last of S positions, are cut into runs of `rows` and keys into blocks of `width`.

    Block boundaries are those of the runs, so that a run's own keys are whole blocks. `rows` is a multiple of `width`.
    """

    T: int
    S: int
    rows: int = 64
    width: int = 64

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.S - self.T

    @property
    def n_runs(self) -> int:
        return -(-self.T // self.rows)

    @property
    def n_before(self) -> int:
        """Blocks before the first query; the first of them may begin below 0."""
        return -(-self.past // self.width)

    @property
    def n_blocks(self) -> int:
        """Blocks of keys there are."""
        return self.n_before + -(-self.T // self.width)

    @property
    def first_key(self) -> int:
        """Position of the first key of block 0: 0, or a little below."""
        return self.past - self.n_before * self.width

    def run_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """(N,) position of the first query of each run."""
        return self.past + self.rows * torch.arange(self.n_runs, device=device)


class Coverage(NamedTuple):
    """What each of n heads reads in every run.

    diagonals: (n, distances) bool, which block distances; 0 is the block that the query is in.
    columns: (n, C) int64, single keys, each once; S or more means none.
    """

    diagonals: Tensor
    columns: Tensor


def list_coverage(found: Coverage, layout: Layout) -> SparseIndex:
    """The index of n heads, as (1, n, N, ...). A column that a diagonal covers in a run is not listed again there."""
    reads = _relative_blocks(found.diagonals, layout)
    blocks, n_blocks = _list_blocks(reads, layout)
    columns, n_columns = _list_columns(found.columns, reads, layout)
    return SparseIndex(blocks, n_blocks, columns, n_columns, layout.rows, layout.width)


def list_blocks(reads: Tensor, layout: Layout) -> SparseIndex:
    """The index of heads that read whole blocks, other ones in every run. reads: (n, N, n_blocks) bool."""
    n_blocks = reads.sum(-1, dtype=torch.int32)
    numbers = _compact(torch.arange(reads.shape[2], device=reads.device).expand_as(reads), reads)
    blocks = (layout.first_key + numbers.long() * layout.width).clamp_max(NOWHERE).int()
    none = blocks.new_empty((*reads.shape[:2], 0))
    return SparseIndex(
        blocks[None], n_blocks[None], none[None], torch.zeros_like(n_blocks)[None], layout.rows, layout.width
    )


def stack_heads(parts: list[tuple[list[int], SparseIndex]], n_heads: int) -> SparseIndex:
    """One index of `n_heads` heads from those of some of them, (which heads, their index); the others read nothing."""
    first = parts[0][1]
    shape = (1, n_heads, first.n_blocks.shape[2])
    blocks = first.blocks.new_full((*shape, max(part.blocks.shape[3] for _, part in parts)), NOWHERE)
    columns = first.columns.new_full((*shape, max(part.columns.shape[3] for _, part in parts)), NOWHERE)
    n_blocks, n_columns = first.n_blocks.new_zeros(shape), first.n_columns.new_zeros(shape)
    for heads, part in parts:
        blocks[:, heads, :, : part.blocks.shape[3]] = part.blocks
        columns[:, heads, :, : part.columns.shape[3]] = part.columns
        n_blocks[:, heads], n_columns[:, heads] = part.n_blocks, part.n_columns
    return SparseIndex(blocks, n_blocks, columns, n_columns, first.rows, first.width)


def _relative_blocks(diagonals: Tensor, layout: Layout) -> Tensor:
    """(n, distances + span) bool: whether a run reads block span - 1 - i, counted from its own first one.

    A run of several blocks reads what any of them reads at its distances.
    """
    span = layout.rows // layout.width
    n, far = diagonals.shape
    reads = diagonals.new_zeros((n, far + span - 1))
    for i in range(span):
        reads[:, span - 1 - i : span - 1 - i + far] |= diagonals
    return reads


def _list_blocks(reads: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Blocks of every run, nearest first, so that those below the first key come last and are not counted."""
    span = layout.rows // layout.width
    index = torch.arange(reads.shape[1], device=reads.device).expand_as(reads)
    behind = _compact(index, reads).long()
    starts = layout.run_starts(reads.device)[:, None] + (span - 1 - behind[:, None]) * layout.width  # [n, N, A]
    listed = (behind[:, None] < NOWHERE) & (starts > -layout.width)
    return starts.clamp_min(-layout.width).int()[None], listed.sum(-1, dtype=torch.int32)[None]


def _list_columns(columns: Tensor, reads: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Columns of every run: those before its end that its blocks do not hold."""
    starts = layout.run_starts(columns.device)
    span = layout.rows // layout.width
    block = torch.div(columns[:, None] - starts[:, None], layout.width, rounding_mode="floor")  # [n, N, C]
    index = span - 1 - block
    seen = (index >= 0) & (columns[:, None] < layout.S)
    inside = index.clamp(0, reads.shape[1] - 1)
    held = reads[:, None].expand(-1, len(starts), -1).gather(2, inside) & (index < reads.shape[1])
    kept = seen & ~held
    listed = _compact(columns[:, None].expand_as(kept), kept)
    return listed[None], kept.sum(-1, dtype=torch.int32)[None]


def _compact(x: Tensor, kept: Tensor) -> Tensor:
    """The kept entries of each row of x as int32, first and in order; `NOWHERE` after them."""
    most = int(kept.sum(-1).max()) if kept.numel() else 0
    place = torch.where(kept, kept.cumsum(-1) - 1, most)
    listed = torch.full((*kept.shape[:-1], most + 1), NOWHERE, dtype=torch.int32, device=x.device)
    listed.scatter_(-1, place, x.int())
    return listed[..., :most].contiguous()
