"""Causal attention over listed keys on a GPU: all batches and heads in one launch, nothing gathered or repeated.

A program owns up to BLOCK_M queries of one head and reads the list of their run: first the blocks of consecutive keys,
then the single keys, one softmax running over both. Blocks that every query of the tile sees whole, nearly all of them,
need no mask: in a list that rises or falls the others stand at its ends. In any other list, all blocks are masked.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval_attn.kernels.merge import AttentionState
from retrieval_attn.kernels.sparse.lists import HEAD_DIMS, SparseIndex

# Below every finite score; unlike -inf it may be subtracted from -inf.
LOWEST = tl.constexpr(-3.4e38)

LN_2 = tl.constexpr(math.log(2))

# Listed blocks that are looked through at a time.
LOOK = tl.constexpr(128)

SIZES = (16, 32, 64, 128)


class Launch(NamedTuple):
    """How the kernel is compiled: its constants, and num_warps, num_stages and the like."""

    constants: dict[str, int]
    options: dict[str, int | bool]


class _Tile(NamedTuple):
    """At most so many queries and keys at a time, with so many warps; num_stages - 1 tiles of keys are in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By bytes of an element and padded head dimension. An RTX 4090 has 99 KiB of shared memory for one program and 100 KiB
# for all on a processor: with the usual 64 queries, in half precision, two programs fit up to dimension 128.
TILES = {
    (2, 64): _Tile(128, 64, 8, 3),
    (2, 128): _Tile(128, 32, 8, 3),
    (2, 256): _Tile(128, 16, 8, 3),
    (4, 64): _Tile(32, 32, 4, 1),
    (4, 128): _Tile(32, 16, 8, 1),
    (4, 256): _Tile(32, 16, 8, 1),
}

# Cards of 227 KiB and matrix units that want wider tiles: compute capabilities 9.x and 10.x.
LARGE_TILES = TILES | {(2, 128): _Tile(128, 64, 8, 3), (2, 256): _Tile(128, 32, 8, 3)}


@triton.jit(do_not_specialize=["T", "S", "N", "A", "C"])
def _attend(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, out: tl.tensor, lse: tl.tensor, blocks: tl.tensor,
    n_blocks: tl.tensor, columns: tl.tensor, n_columns: tl.tensor, query_batch: tl.tensor, query_head: tl.tensor,
    query_row: tl.tensor, key_batch: tl.tensor, key_head: tl.tensor, key_row: tl.tensor, value_batch: tl.tensor,
    value_head: tl.tensor, value_row: tl.tensor, scale: tl.tensor, H: tl.tensor, R: tl.tensor, T: tl.tensor,
    S: tl.tensor, N: tl.tensor, A: tl.tensor, C: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """One program: BLOCK_M queries of one head. scale: with log2(e) in it, so that scores are in base 2."""
    # The last queries have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # of all B * H
    h = head % H
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = S - T + rows
    stop = S - T + tl.minimum((tile + 1) * BLOCK_M, T)  # no query of the tile sees this key
    query += head // H * query_batch + h * query_head
    keys += head // H * key_batch + h // R * key_head
    values += head // H * value_batch + h // R * value_head
    q = _load_rows(query, rows, query_row, rows < T, D, BLOCK_D)
    run = head * N + tile * BLOCK_M // ROWS
    blocks += run * A
    columns += run * C
    n = tl.minimum(tl.load(n_blocks + run), A)
    low, high = _whole_blocks(blocks, n, S - T + tile * BLOCK_M + 1 - WIDTH)

    # The output is kept in two halves: where they are no wider than high, each warp owns whole rows of the scores.
    HALF: tl.constexpr = BLOCK_D // 2
    left = tl.zeros([BLOCK_M, HALF], tl.float32)
    right = tl.zeros([BLOCK_M, HALF], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Positions are read a step ahead: a load whose address waits for another load cannot be in flight early.
    parts: tl.constexpr = WIDTH // BLOCK_N
    start = tl.load(blocks + low, mask=low < high, other=0)
    for i in range(low * parts, high * parts):
        found = start + i % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.load(blocks + (i + 1) // parts, mask=i + 1 < high * parts, other=0)
        left, right, top, total = _fold(
            left, right, top, total, q, keys, values, key_row, value_row, found, positions, stop, scale,
            D, BLOCK_D, WHOLE=True,
        )  # fmt: skip

    for i in tl.range(0, (n - high + low) * parts, num_stages=1):
        block = tl.where(i < low * parts, i, i + (high - low) * parts)
        found = tl.load(blocks + block // parts) + block % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        left, right, top, total = _fold(
            left, right, top, total, q, keys, values, key_row, value_row, found, positions, stop, scale,
            D, BLOCK_D, WHOLE=False,
        )  # fmt: skip

    n = tl.minimum(tl.load(n_columns + run), C)
    listed = tl.arange(0, BLOCK_N)
    ahead = tl.load(columns + listed, mask=listed < n, other=-1)
    for _ in range(0, n, BLOCK_N):
        found = ahead
        listed += BLOCK_N
        ahead = tl.load(columns + listed, mask=listed < n, other=-1)
        left, right, top, total = _fold(
            left, right, top, total, q, keys, values, key_row, value_row, found, positions, stop, scale,
            D, BLOCK_D, WHOLE=False,
        )  # fmt: skip

    some = total > 0
    total = tl.where(some, total, 1.0)
    rows_out = head * T + rows
    tl.store(lse + rows_out, tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf")), mask=rows < T)
    _store_rows(out, rows_out, left / total[:, None], rows < T, D, HALF, HALF)
    _store_rows(out + HALF, rows_out, right / total[:, None], rows < T, D, D - HALF, HALF)


@triton.jit
def _whole_blocks(blocks: tl.tensor, n: tl.tensor, last: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The range of the n listed blocks that start at 0 to `last`, if they stand together; otherwise an empty one."""
    low = n
    high = 0
    count = 0
    for i in range(0, n, LOOK):
        place = i + tl.arange(0, LOOK)
        start = tl.load(blocks + place, mask=place < n, other=-1)
        whole = (start >= 0) & (start <= last)
        low = tl.minimum(low, tl.min(tl.where(whole, place, n)))
        high = tl.maximum(high, tl.max(tl.where(whole, place + 1, 0)))
        count += tl.sum(whole.to(tl.int32))
    together = high - low == count
    return tl.where(together, low, 0), tl.where(together, high, 0)


@triton.jit
def _fold(
    left: tl.tensor, right: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, keys: tl.tensor,
    values: tl.tensor, key_row: tl.tensor, value_row: tl.tensor, found: tl.tensor, positions: tl.tensor,
    stop: tl.tensor, scale: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The running softmax with the keys at `found` in it. WHOLE: they all exist and all queries see them."""
    HALF: tl.constexpr = BLOCK_D // 2
    exists: tl.tensor = None if WHOLE else (found >= 0) & (found < stop)
    k = _load_rows(keys, found, key_row, exists, D, BLOCK_D)
    v_left = _load_rows(values, found, value_row, exists, HALF, HALF)
    v_right = _load_rows(values + HALF, found, value_row, exists, D - HALF, HALF)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    if not WHOLE:
        seen = exists[None, :] & (found[None, :] <= positions[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v_left.dtype)
    left = tl.dot(weights, v_left, left * shrink[:, None], input_precision="ieee")
    right = tl.dot(weights, v_right, right * shrink[:, None], input_precision="ieee")
    return left, right, higher, total


@triton.jit
def _load_rows(
    x: tl.tensor,
    found: tl.tensor,
    stride: tl.tensor,
    exists: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """The first D numbers of the rows `found` of x, zero past D and where not `exists` (None: all do); BLOCK_D wide."""
    dims = tl.arange(0, BLOCK_D)
    at = x + found.to(tl.int64)[:, None] * stride + dims[None, :]
    if exists is not None:
        return tl.load(at, mask=exists[:, None] & (dims < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store_rows(
    x: tl.tensor,
    rows: tl.tensor,
    data: tl.tensor,
    exists: tl.tensor,
    stride: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    dims = tl.arange(0, BLOCK_D)
    at = x + rows[:, None] * stride + dims[None, :]
    tl.store(at, data.to(x.dtype.element_ty), mask=exists[:, None] & (dims < D)[None, :])


def attend_sparse(query: Tensor, keys: Tensor, values: Tensor, scale: float, index: SparseIndex) -> AttentionState:
    """`attend.attend_sparse`, which has checked that its arguments fit together, for at least one query.

    Any strides do but between the elements of a row, which are copied to be neighbours if they are not; so are the
    tensors of the index.
    Raises ValueError for a head dimension that is not in HEAD_DIMS, and for rows and widths that are not in SIZES.
    """
    B, H, T, D = query.shape
    G, S = keys.shape[1:3]
    capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 0  # 0: interpreted
    constants, options = launch(D, query.dtype, index.rows, index.width, capability)
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    lists = [x.contiguous() for x in (index.blocks, index.n_blocks, index.columns, index.n_columns)]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    strides = (stride for x in (query, keys, values) for stride in x.stride()[:3])
    sizes = H, H // G, T, S, index.n_blocks.shape[2], index.blocks.shape[3], index.columns.shape[3]
    with torch.cuda.device_of(query):
        _attend[triton.cdiv(T, constants["BLOCK_M"]), B * H](
            query, keys, values, out, lse, *lists, *strides, scale / math.log(2), *sizes, **constants, **options
        )
    return AttentionState(out, lse)


def launch(head_dim: int, dtype: torch.dtype, rows: int, width: int, capability: int) -> Launch:
    """What the kernel is compiled with. capability: the first number of the card's compute capability.

    Raises as attend_sparse does.
    """
    if head_dim not in HEAD_DIMS:
        supported = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"head dimension must be one of {supported} on a GPU, got {head_dim}")
    for name, size in (("rows", rows), ("width", width)):
        if size not in SIZES:
            raise ValueError(f"index.{name} must be one of {', '.join(map(str, SIZES))} on a GPU, got {size}")
    padded = triton.next_power_of_2(head_dim)
    tile = (LARGE_TILES if capability in (9, 10) else TILES)[dtype.itemsize, padded]
    constants = {"D": head_dim, "BLOCK_D": padded, "ROWS": rows, "WIDTH": width}
    constants |= {"BLOCK_M": min(rows, tile.queries), "BLOCK_N": min(width, tile.keys)}
    num_warps = max(4, tile.num_warps * constants["BLOCK_M"] // tile.queries)
    # Triton is about to change its default for the fusion of multiply and add, and warns unless told.
    return Launch(constants, {"num_warps": num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True})
