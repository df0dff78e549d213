"""Attention over the window on the device in one launch, for the few queries of a decode step.

A program takes 16 rows of one KV head: a row is one query of one head of the group, so each key is read once for all of
them. It walks the whole window alone. Windows are short, and programs that shared one would have to be merged, by a
second launch or by waiting for each other. Whether that would pay at a few thousand keys has not been measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The least that a matrix product takes. More would only leave fewer programs: a step has R * T rows a KV head.
ROWS = 16

# Bytes of a row of keys, padded to a power of two -> (keys a tile, warps): a few tiles of keys and of values are to be
# on their way into the 99 KB of shared memory that a program may use on an RTX 4090.
SETTINGS = {
    128: (64, 4),
    256: (64, 4),
    512: (32, 8),
    1024: (16, 4),
}
STAGES = 3

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def attend_near(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of `near.attend_near`, for what that has checked: one dtype and dimension, a query and a key."""
    B, H, T, D = query.shape
    G, W = keys.shape[1:3]
    rows = H // G * T
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    # Axes of stride 0 repeat what is there; nothing is written out.
    seen = query if mask is None else mask.expand(B, H, T, W)
    out = torch.empty((B, H, T, D), dtype=query.dtype, device=query.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=query.device)
    constants, options = settings(D, query.dtype, masked=mask is not None)
    with torch.cuda.device_of(query):
        _attend[(triton.cdiv(rows, ROWS), B * G)](
            query, keys, values, seen, out, lse, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *seen.stride(), scale, G, rows, T, W, **constants, **options,
        )  # fmt: skip
    return out, lse


def settings(D: int, dtype: torch.dtype, masked: bool) -> tuple[dict[str, int | bool], dict[str, int]]:
    """Constants and launch options of the kernel."""
    padded = triton.next_power_of_2(D)
    width, warps = SETTINGS[padded * dtype.itemsize]
    constants = {"MASKED": masked, "D": D, "BLOCK_D": padded, "BLOCK_M": ROWS, "BLOCK_N": width}
    return constants, {"num_warps": warps, "num_stages": STAGES}


@triton.jit
def _attend(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, mask: tl.tensor, out: tl.tensor, lse: tl.tensor,
    query_b: tl.tensor, query_h: tl.tensor, query_t: tl.tensor, keys_b: tl.tensor, keys_g: tl.tensor, keys_w: tl.tensor,
    values_b: tl.tensor, values_g: tl.tensor, values_w: tl.tensor, mask_b: tl.tensor, mask_h: tl.tensor,
    mask_t: tl.tensor, mask_w: tl.tensor, scale: tl.tensor, G: tl.tensor, n_rows: tl.tensor, T: tl.tensor, W: tl.tensor,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """query (B, H, T, D), keys, values (B, G, W, D), mask (B, H, T, W), by strides; out and lse contiguous."""
    b, g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < n_rows
    # Heads of a group lie side by side: row r of KV head g is query r % T of head g * R + r // T.
    h, t = g * (n_rows // T) + row // T, (row % T).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d < D)[None, :]
    at = b * query_b + h * query_h + t * query_t
    q = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    mask_at = b * mask_b + h * mask_h + t * mask_t

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, W, BLOCK_N):
        w = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        there = (w < W)[:, None] & (d < D)[None, :]
        k = tl.load(keys + b * keys_b + g * keys_g + w[:, None] * keys_w + d[None, :], mask=there, other=0.0)
        # Scores are scaled, not queries: a scaled query would be rounded to its dtype once more.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)  # [BLOCK_M, BLOCK_N]
        seen = real[:, None] & (w < W)[None, :]
        if MASKED:
            seen = seen & (tl.load(mask + mask_at[:, None] + w[None, :] * mask_w, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has nothing to subtract; -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(values + b * values_b + g * values_g + w[:, None] * values_w + d[None, :], mask=there, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    # The largest weight is 1, so only a row without keys has a total of 0; its `top` is -inf, and so is its lse.
    total = tl.where(total == 0, 1.0, total)
    mean = acc / total[:, None]
    row_out = (b * G + g) * n_rows + row
    tl.store(out + row_out[:, None] * D + d[None, :], mean.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row_out, (top + tl.log2(total)) * LN_2, mask=real)
