"""The exact keys of largest inner product for sampled queries, a tile of keys at a time.

A query and a key meet once. What is kept of a query is its best keys so far; what a tile offers is compared with the
worst of them first, and little is better: of 128K keys in random order, about 800 ever enter the best 100.

A score and an id travel as one int64 that sorts by score and then by lower id: in the high half the score, its bits
arranged to rise with it, in the low half the complement of the id.
"""

import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.merge import has_triton
from retrieval_attn.kernels.sparse.lists import DTYPES, HEAD_DIMS

log = logging.getLogger("retrieval_attn")

# Queries and keys per tile: 4 MiB of scores.
ROWS, KEYS = 256, 4096

# The most keys per query that the Triton kernel keeps.
MOST_FUSED = 896

LOW_HALF = 0xFFFFFFFF


class NearestKeys(NamedTuple):
    """ids: (H, T, k) int32, best first, ties by lower id, -1 where there are none left; scores: (H, T, k) float32, raw
    inner products, -inf where there is no key."""

    ids: Tensor
    scores: Tensor


def nearest_keys(queries: Tensor, keys: Tensor, k: int) -> NearestKeys:
    """The k keys of largest inner product for each query, exactly.

    queries: (H, T, D); keys: (G, S, D), on one device, of float16, bfloat16 or float32, the two may differ; KV head of
    query head h is h // R. k may exceed S. Scores are accumulated in float32; a key that scores -inf counts as absent.
    Never writes out T x S scores. On a GPU one kernel does it for D = 64, 96, 128 or 256 and k <= 896, with 2 KiB of
    memory a query (8 for the larger k), times the ranges of keys that few queries are searched in side by side; what it
    does not take runs in plain PyTorch, and says so once. NaN is looked for in the result, which waits for the GPU.
    Raises ValueError for shapes, dtypes and devices that do not fit, for k < 1, and for scores of NaN or infinity.
    Leaves its arguments unchanged; safe from many threads.
    """
    _check(queries, keys, k)
    H, T, D = queries.shape
    G, S, _ = keys.shape
    most = min(k, S)
    folded = queries.reshape(G, H // G * T, D).to(torch.promote_types(queries.dtype, keys.dtype))
    if folded.numel() == 0 or most == 0:
        best = folded.new_full((*folded.shape[:2], 0), 0, dtype=torch.int64)
    elif queries.device.type == "cuda" and _is_fused(queries.device, D, most):
        from retrieval_attn.kernels.triton_knn import best_keys

        best = best_keys(folded, keys, most)
    else:
        best = torch.stack([_best_keys(folded[g].float(), keys[g], most) for g in range(G)])
    ids, scores = unpack(torch.nn.functional.pad(best, (0, k - best.shape[2]), value=EMPTY).view(H, T, k))
    _raise_if_not_finite(scores)
    return NearestKeys(ids, scores)


def pack(scores: Tensor, ids: Tensor) -> Tensor:
    """float32 and integers of one shape as int64; NaN counts as infinity, so that it shows."""
    # Adding 0 makes -0.0 the equal of 0.0 in its bits too.
    bits = (scores.nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0).view(torch.int32)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) | (~ids.long() & LOW_HALF)


def unpack(packed: Tensor) -> NearestKeys:
    rising = (packed >> 32).int()
    scores = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return NearestKeys((~packed & LOW_HALF).int(), scores)


# Id -1 at score -inf, below everything that can be found.
EMPTY = int(pack(torch.tensor(-torch.inf), torch.tensor(-1)))


def _check(queries: Tensor, keys: Tensor, k: int) -> None:
    shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
    if not queries.ndim == keys.ndim == 3 or queries.shape[2] != keys.shape[2]:
        raise ValueError(f"queries and keys must be (H, T, D) and (G, S, D), got {shapes}")
    if keys.shape[0] == 0 or queries.shape[0] % keys.shape[0]:
        raise ValueError(f"queries and keys must have heads H a multiple of G, got {shapes}")
    if queries.dtype not in DTYPES or keys.dtype not in DTYPES:
        found = " and ".join(str(x.dtype).removeprefix("torch.") for x in (queries, keys))
        raise ValueError(f"queries and keys must be float16, bfloat16 or float32, got {found}")
    if queries.device != keys.device:
        raise ValueError(f"queries and keys must be on one device, got {queries.device} and {keys.device}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


@functools.cache
def _is_fused(device: torch.device, D: int, k: int) -> bool:
    """Whether the Triton kernel takes such inputs; the cache makes it speak once per case."""
    if not has_triton(device):
        return False
    if D in HEAD_DIMS and k <= MOST_FUSED:
        return True
    limits = f"dimension {', '.join(map(str, HEAD_DIMS))} and k <= {MOST_FUSED}"
    log.warning("exact kNN runs in plain PyTorch, which is slower: its kernel wants %s, got %d and %d", limits, D, k)
    return False


def _best_keys(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """queries: (N, D) float32, keys: (S, D) -> (N, k) int64, packed, best first."""
    best = torch.full((len(queries), k), EMPTY, device=queries.device)
    for tile in _tiles(len(keys), k):
        columns = keys[tile].float().mT
        for first in range(0, len(queries), ROWS):
            rows = slice(first, first + ROWS)
            _improve(best[rows], queries[rows] @ columns, tile.start)
    return best


def _tiles(S: int, k: int) -> Iterator[slice]:
    """Tiles of up to KEYS keys, the first ones short: of as many keys as were seen before, about k are better."""
    start = 0
    while start < S:
        stop = min(S, start + min(KEYS, max(start, k)))
        yield slice(start, stop)
        start = stop


def _improve(best: Tensor, scores: Tensor, start: int) -> None:
    """Merge scores (N, n) of the keys from `start` on into best (N, k), in place."""
    worst = unpack(best[:, -1:]).scores
    # Later keys lose ties, so only what is above counts; NaN passes too, to be reported.
    better = scores.le(worst).logical_not_()
    counts = better.sum(1)
    most = int(counts.max())
    if most == 0:
        return
    row, column = better.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    offered = best.new_full((len(best), most), EMPTY)
    offered[row, place] = pack(scores[row, column], column + start)
    best.copy_(torch.cat([best, offered], dim=1).topk(best.shape[1]).values)


def _raise_if_not_finite(scores: Tensor) -> None:
    bad = scores.amax((1, 2)) == torch.inf if scores.numel() else scores.new_zeros(0)
    if bad.any():
        head = int(bad.nonzero()[0])
        raise ValueError(f"the scores of head {head} must be finite, got NaN or infinity: look in its queries and keys")
