"""The ways to attend to a prompt that are timed beside each other, each a chunk of queries at a time.

A method is prepared for a chunk, which costs what a caller would pay once (a mask, a compilation), and then run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from retrieval_attn.kernels import attend_adaptive, attend_dense, attend_patterns
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.patterns import DEFAULT_SIZES, HeadPattern, fixed_index

# Fewer listed keys than this are looked at at a time when they are counted.
_COUNTED = 1 << 22


class Chunk(NamedTuple):
    """query (1, H, T, D), the last T of the S positions of keys, values (1, G, S, D)."""

    query: Tensor
    keys: Tensor
    values: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def pairs(self) -> float:
        """Of a query of a head and a key that it sees."""
        H, T = self.query.shape[1:3]
        return H * T * (self.keys.shape[2] - (T - 1) / 2)


class Result(NamedTuple):
    """out (1, H, T, D); lse (1, H, T), None if the method does not tell; density, the share of `Chunk.pairs` read, None
    if only `count_pairs` can tell."""

    out: Tensor
    lse: Tensor | None
    density: float | None


Run = Callable[[], Result]


def sdpa(chunk: Chunk) -> Run:
    """PyTorch's own attention, the heads of the keys repeated beforehand; a chunk with a past has its causal bias."""
    T, S = chunk.query.shape[2], chunk.keys.shape[2]
    R = chunk.query.shape[1] // chunk.keys.shape[1]
    keys, values = (x.repeat_interleave(R, dim=1) for x in (chunk.keys, chunk.values))
    causal: dict[str, Any] = {"attn_mask": causal_lower_right(T, S)} if T < S else {"is_causal": True}

    def run() -> Result:
        out = scaled_dot_product_attention(chunk.query, keys, values, scale=chunk.scale, **causal)
        return Result(out, None, 1.0)

    return run


def dense(chunk: Chunk) -> Run:
    """Ours: the same library kernels without a mask, on the square and on the past, merged."""
    return lambda: Result(*attend_dense(*chunk, chunk.scale, causal=True), 1.0)


def flex(chunk: Chunk) -> Run:
    """FlexAttention, compiled once for all lengths, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    T, S = chunk.query.shape[2], chunk.keys.shape[2]
    # A tensor: a number would be compiled in.
    past = torch.tensor(S - T, device=chunk.query.device)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + past >= k

    mask = create_block_mask(causal, None, None, T, S, device=str(chunk.query.device))
    return lambda: Result(_compiled_flex()(*chunk, block_mask=mask, scale=chunk.scale, enable_gqa=True), None, 1.0)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


# What the patterns by a budget of mass choose from; None: all that pay on this machine.
ADAPTIVE = {"auto": None, "mass_vertical_slash": ("vertical_slash",)}


def adaptive(mass: float, kinds: Sequence[str] | None) -> Callable[[Chunk], Run]:
    """Each head by the cheapest pattern that keeps so much of the mass; the choice is part of the time."""

    def prepare(chunk: Chunk) -> Run:
        def run() -> Result:
            state, choices = attend_adaptive(*chunk, chunk.scale, mass, kinds)
            return Result(*state, sum(choice.density for choice in choices) / len(choices))

        return run

    return prepare


def fixed(pattern: HeadPattern) -> Callable[[Chunk], Run]:
    """All heads by one pattern; listing what it reads is part of the time."""

    def prepare(chunk: Chunk) -> Run:
        patterns = [pattern] * chunk.query.shape[1]
        return lambda: Result(*attend_patterns(*chunk, chunk.scale, patterns), None)

    return prepare


def methods(patterns: tuple[str, ...], mass: float, device: str) -> dict[str, Callable[[Chunk], Run]]:
    """What is timed, by name: dense attention in each form that runs on the device, then the patterns."""
    found: dict[str, Callable[[Chunk], Run]] = {"sdpa": sdpa, "dense": dense}
    if device.startswith("cuda"):
        found["flex"] = flex
    for name in patterns:
        found[name] = adaptive(mass, ADAPTIVE[name]) if name in ADAPTIVE else fixed(DEFAULT_SIZES[name])
    return found


def density_of(name: str, chunk: Chunk) -> float:
    """The share of `Chunk.pairs` that a pattern of the paper's sizes reads, by counting its lists, a head at a time."""
    query, keys, pattern = chunk.query[0], chunk.keys[0], DEFAULT_SIZES[name]
    T, S = query.shape[1], keys.shape[1]
    R, layout = len(query) // len(keys), Layout(T, S)
    read = 0
    for h in range(len(query)):
        lists = fixed_index(query[h : h + 1], keys[h // R : h // R + 1], chunk.scale, pattern, layout)
        read += count_pairs(lists, T, S)
    return read / chunk.pairs


def count_pairs(index: SparseIndex, T: int, S: int) -> int:
    """Pairs of a query and a key that `index` lists for it and that it sees, over all its heads."""
    n_runs = index.n_blocks.shape[2]
    starts = S - T + index.rows * torch.arange(n_runs, device=index.blocks.device)
    stops = (starts + index.rows).clamp_max(S)
    within = torch.arange(index.width, device=starts.device)
    n = max(1, _COUNTED // max(1, index.blocks.shape[3] * index.width))
    total = 0
    for first in range(0, n_runs, n):
        here = slice(first, first + n)
        blocks = index.blocks[:, :, here].long()[..., None] + within
        for keys, counts in ((blocks, index.n_blocks), (index.columns[:, :, here].long()[..., None], index.n_columns)):
            listed = torch.arange(keys.shape[3], device=starts.device) < counts[:, :, here, None]
            low = torch.maximum(keys, starts[here, None, None])
            seen = (stops[here, None, None] - low).clamp_min(0) * ((keys >= 0) & listed[..., None])
            total += int(seen.sum())
    return total
