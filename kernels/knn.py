"""The best keys of many queries, exactly, without ever holding all scores: what an index build learns from.

Scores are made block by block as matrix products and folded at once into the best k so far, so memory is bounded by one
block whatever the number of keys. Runs where its arguments are.
"""

import torch
from torch import Tensor

# Scores held at once: 256 MiB of float32.
MOST_SCORES = 1 << 26

# Queries that go through all keys together.
QUERIES = 2048


def best_keys(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Ids of the k keys of largest inner product for every query of every KV head, best first.

    queries: (H, T, D); keys: (G, S, D), on one device, any float dtype. KV head g serves query heads g * R to
    (g + 1) * R - 1, whose queries stand one head after the other in its rows.
    Returns (G, R * T, min(k, S)) int32 on that device; of equal scores any may come first. Products are taken in
    float32 on a CPU, elsewhere in the keys' dtype with float32 sums. Raises ValueError for shapes that do not fit and
    for k < 1.
    """
    G, S, D = keys.shape if keys.ndim == 3 else (0, 0, 0)
    if queries.ndim != 3 or G == 0 or queries.shape[0] % G or queries.shape[2] != D:
        raise ValueError(
            f"queries and keys must be (H, T, D) and (G, S, D) with H a multiple of G, got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
    rows = queries.reshape(G, -1, D).to(dtype)
    ids = torch.empty((G, rows.shape[1], min(k, S)), dtype=torch.int32, device=keys.device)
    for g in range(G):
        for first in range(0, rows.shape[1], QUERIES):
            part = slice(first, first + QUERIES)
            ids[g, part] = _best_of_head(rows[g, part], keys[g], min(k, S))
    return ids


def _best_of_head(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    block = max(k, MOST_SCORES // max(1, len(queries)))
    best = queries.new_empty((len(queries), 0), dtype=torch.float32)
    ids = torch.empty((len(queries), 0), dtype=torch.int32, device=keys.device)
    for start in range(0, len(keys), block):
        scores = (queries @ keys[start : start + block].to(queries.dtype).T).float()
        top = scores.topk(min(k, scores.shape[1]), dim=1)
        best = torch.cat([best, top.values], dim=1)
        ids = torch.cat([ids, (top.indices + start).int()], dim=1)
        kept = best.topk(min(k, best.shape[1]), dim=1)
        best, ids = kept.values, ids.gather(1, kept.indices)
    return ids
