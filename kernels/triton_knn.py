"""The exact best keys of many queries, fused: scores stay in registers, and only what might be kept is written.

A program takes a tile of the queries of one KV head through a range of its keys. Each query has ROOM slots in memory:
first its best keys so far, then what was found since that beats the worst of them. When some query has no room for what
a tile offers, the slots of all are sorted and cut to the best, and the bar rises. Most tiles offer a few keys, so that
a cut comes once in many tiles; to merge every tile into a sorted list would cost more than its matrix product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval_attn.kernels.knn import EMPTY

# Slots a query: at least k and the keys of a tile.
ROOMS = (256, 1024)

# Slots that are sorted at a time, in registers.
SORTED = 1024

# (bytes a number, padded D) -> (queries a tile, keys a tile, warps), such that no register spills on sm_80 to sm_90.
# Products of float32 do not run on tensor cores and want smaller shares of a tile.
SETTINGS = {
    (2, 64): (32, 128, 4),
    (2, 128): (16, 128, 4),
    (2, 256): (32, 128, 4),
    (4, 64): (32, 32, 4),
    (4, 128): (64, 64, 8),
    (4, 256): (32, 16, 4),
}

# Programs that a processor should have, and the fewest keys worth a range of their own.
PROGRAMS, LEAST_RANGE = 2, 8192


def best_keys(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """queries: (G, N, D); keys: (G, S, D), of no wider dtype; 1 <= k <= S -> (G, N, k) int64, packed, best first."""
    G, N, D = queries.shape
    constants, _ = settings(D, queries.dtype, k)
    n_programs = triton.cdiv(N, constants["BLOCK_M"]) * G
    wanted = PROGRAMS * torch.cuda.get_device_properties(queries.device).multi_processor_count
    return best_of_ranges(queries, keys, k, max(1, min(wanted // n_programs, keys.shape[1] // LEAST_RANGE)))


def best_of_ranges(queries: Tensor, keys: Tensor, k: int, n_ranges: int) -> Tensor:
    """`best_keys` with the keys cut into so many ranges, each searched by programs of its own."""
    (G, N, D), S = queries.shape, keys.shape[1]
    queries, keys = queries.contiguous(), keys if keys.stride(-1) == 1 else keys.contiguous()
    constants, options = settings(D, queries.dtype, k)
    n_tiles = triton.cdiv(N, constants["BLOCK_M"])
    n_rows = n_tiles * constants["BLOCK_M"]
    slots = torch.full((G, n_ranges, n_rows, constants["ROOM"]), EMPTY, device=queries.device)
    bars = torch.full((G, n_ranges, n_rows), -torch.inf, device=queries.device)
    with torch.cuda.device_of(queries):
        _find[(n_tiles, n_ranges, G)](
            queries, keys, slots, bars, *keys.stride()[:2], N, S, triton.cdiv(S, n_ranges), k, **constants, **options
        )
    return slots[:, :, :N].transpose(1, 2).flatten(2).topk(k).values


def settings(D: int, dtype: torch.dtype, k: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and launch options of the kernel for queries of `dtype`."""
    padded = triton.next_power_of_2(D)
    height, width, warps = SETTINGS[dtype.itemsize, padded]
    room = next(room for room in ROOMS if room >= k + width)
    constants = {"D": D, "BLOCK_D": padded, "BLOCK_M": height, "BLOCK_N": width, "ROOM": room, "CUT": SORTED // room}
    # Loads are not pipelined: the loop holds another one, that of the cut.
    return constants, {"num_warps": warps, "num_stages": 1}


@triton.jit
def _find(
    queries, keys, slots, bars, keys_g, keys_s, N, S, span, k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """queries (G, N, D) contiguous, keys (G, S, D) -> slots (G, ranges, N', ROOM), packed, the best k among them."""
    g = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    q = tl.load(queries + (g * N + n)[:, None] * D + d[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    first_row = ((g * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)

    bar = tl.full([BLOCK_M], float("-inf"), tl.float32)
    held = tl.zeros([BLOCK_M], tl.int32)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, S)
    for start in range(begin, end, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        there = (s < end)[:, None] & (d < D)[None, :]
        at = g * keys_g + s.to(tl.int64)[:, None] * keys_s + d[None, :]
        tile = tl.load(keys + at, mask=there, other=0.0).to(q.dtype)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        # NaN counts as infinity, so that it shows; what is out of bounds never beats the bar.
        scores = tl.where(scores == scores, scores, float("inf"))
        scores = tl.where((n < N)[:, None] & (s < end)[None, :], scores, float("-inf"))
        better = (scores > bar[:, None]).to(tl.int32)
        offered = tl.sum(better, 1)
        if tl.max(offered, 0) > 0:
            if tl.max(held + offered, 0) > ROOM:
                _cut_to_best(slots, bars, first_row, k, BLOCK_M, ROOM, CUT)
                bar = tl.load(bars + row)
                held = tl.minimum(held, k)
                better = (scores > bar[:, None]).to(tl.int32)
                offered = tl.sum(better, 1)
            slot = held[:, None] + tl.cumsum(better, 1) - 1
            tl.store(slots + row[:, None] * ROOM + slot, _pack(scores, s[None, :]), mask=better != 0)
            held += offered


@triton.jit
def _cut_to_best(slots, bars, first_row, k, BLOCK_M: tl.constexpr, ROOM: tl.constexpr, CUT: tl.constexpr):
    """Bring the best k of each row of slots to its front, best first, and note the score of the last as its bar."""
    slot = tl.arange(0, ROOM)
    # Threads read here what others have written, and the other way round after.
    tl.debug_barrier()
    for start in range(0, BLOCK_M, CUT):
        row = first_row + start + tl.arange(0, CUT)
        at = row[:, None] * ROOM + slot[None, :]
        ordered = tl.sort(tl.load(slots + at), descending=True)  # [CUT, ROOM]
        last = tl.sum(tl.where(slot[None, :] == k - 1, ordered, 0), 1)
        # What is behind the best may stay until something takes its slot: it will not pass them.
        tl.store(slots + at, ordered)
        tl.store(bars + row, _score(last))
    tl.debug_barrier()


@triton.jit
def _pack(scores, ids):
    """As `knn.pack` does."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def _score(packed):
    """The score in what `_pack` made."""
    rising = (packed >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
