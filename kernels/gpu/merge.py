"""Two states of attention into one, in one launch: read both, weigh, write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of `out` a program, and warps: 16 elements a thread.
ELEMENTS, WARPS = 2048, 4


def merge_pair(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The union of two states: `out` (..., D) in `dtype` and lse (...) float32, as `merge.merge` defines them.

    Shapes and devices were checked there, dtypes are any; at least one element.
    """
    D = out.shape[-1]
    n_rows = lse.numel()
    inputs = (x.contiguous() for x in (out, lse, other_out, other_lse))
    merged, merged_lse = (
        torch.empty(x.shape, dtype=kind, device=x.device) for x, kind in ((out, dtype), (lse, torch.float32))
    )
    constants, options = settings(D)
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(n_rows, constants["BLOCK_M"]),)](
            *inputs, merged, merged_lse, n_rows, D, **constants, **options
        )
    return merged, merged_lse


def settings(D: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and launch options of the kernel."""
    padded = triton.next_power_of_2(D)
    return {"BLOCK_D": padded, "BLOCK_M": max(1, min(16, ELEMENTS // padded))}, {"num_warps": WARPS}


@triton.jit
def _merge(
    a_out: tl.tensor,
    a_lse: tl.tensor,
    b_out: tl.tensor,
    b_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    n_rows: tl.tensor,
    D: tl.tensor,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """All (n_rows, D) and (n_rows,), contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = row < n_rows
    x = tl.load(a_lse + row, mask=real, other=float("-inf")).to(tl.float32)
    y = tl.load(b_lse + row, mask=real, other=float("-inf")).to(tl.float32)
    top = tl.maximum(x, y)
    # Two empty sides would differ by NaN; their outputs are both zero, so any share will do.
    empty = top == float("-inf")
    gap = tl.where(empty, 0.0, y - x)
    # Overflow is right here: exp(200) is infinite and leaves a share of 0.
    share = 1 / (1 + tl.exp(-gap))
    tl.store(lse + row, tl.where(empty, top, top + tl.log(1 + tl.exp(-tl.abs(gap)))), mask=real)

    at = row[:, None] * D + d[None, :]
    inside = real[:, None] & (d < D)[None, :]
    a = tl.load(a_out + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    b = tl.load(b_out + at, mask=inside, other=0.0).to(tl.float32)
    # From the nearer end: a share of exactly 0 or 1 gives back that side to the bit.
    share = share[:, None]
    mixed = tl.where(share < 0.5, a + share * (b - a), b - (1 - share) * (b - a))
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside)
