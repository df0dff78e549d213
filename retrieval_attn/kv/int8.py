"""Keys and values as 8-bit integers: half the memory, one scale for every head and coordinate.

A scale of its own for every coordinate keeps small coordinates beside large ones, and it can be moved to the other side
of an inner product: <q, s k> = <q s, k>. So indexes and kernels read plain integers and know nothing of scales.
"""

import torch
from torch import Tensor

MOST = 127

# Scales leave room above the largest number seen so far: the largest of 128K normal numbers is 1.27 times that of 2K,
# on average.
HEADROOM = 1.5

# Rows converted at a time.
_BLOCK = 4096

_LEAST = 1e-30


class Scales:
    """What one step of the integers stands for, for each head and coordinate; never changes."""

    def __init__(self, steps: Tensor) -> None:
        """steps: (G, D) float32, above 0."""
        self.steps = steps

    @classmethod
    def least(cls, heads: int, dim: int) -> "Scales":
        """Scales into which nothing but zeros fits."""
        return cls(torch.full((heads, dim), _LEAST))

    def grown(self, new: Tensor) -> "Scales | None":
        """Scales into which rows (G, n, D), of any device, fit as well; None if they fit into these.

        Raises ValueError for NaN or infinity.
        """
        if new.shape[1] == 0:
            return None
        peaks = new.detach().abs().amax(dim=1).float().cpu()
        if not torch.isfinite(peaks).all():
            raise ValueError("keys and values must be finite for kv_dtype='int8', got NaN or infinity; check the model")
        too_small = peaks > MOST * self.steps
        if not too_small.any():
            return None
        return Scales(torch.where(too_small, peaks * (HEADROOM / MOST), self.steps))

    def convert(self, rows: Tensor, before: "Scales", out: Tensor) -> None:
        """Write to `out` the int8 rows (G, n, D), made with other scales, as these have them: rounded once more."""
        for start in range(0, rows.shape[1], _BLOCK):
            part = slice(start, min(rows.shape[1], start + _BLOCK))
            out[:, part] = (rows[:, part] * (before.steps / self.steps)[:, None]).round_().to(torch.int8)

    def encode(self, rows: Tensor) -> Tensor:
        """int8 of rows (G, n, D) that fit, on their device."""
        return (rows.detach().float() / self.steps.to(rows.device)[:, None]).round_().clamp_(-MOST, MOST).to(torch.int8)

    def decode(self, rows: Tensor, dtype: torch.dtype, heads: slice = slice(None)) -> Tensor:
        """Rows (G, n, D) of the given heads as they were, within half a step, and half of each smaller step before."""
        return (rows * self.steps[heads, None]).to(dtype)

    def times(self, x: Tensor) -> Tensor:
        """x (..., H, T, D) times the steps of each head's KV head, in float32."""
        n_shared = x.shape[-3] // len(self.steps)
        return x.float() * self.steps.repeat_interleave(n_shared, 0)[:, None].to(x.device)
