"""Keys that are certainly the best for a query, planted among those of a context."""

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.bench.fidelity.held_out import Held

# A planted key's score lies above the best key's by this part of the way from the mean to the best, and above those of
# other planted keys by this part of them. Queries more alike than ALIKE (cosine) are not both given a key.
MARGIN, APART, ALIKE = 0.1, 0.05, 0.95

# At most one far key in so many is planted.
_ROOM = 4


def plant(held: Held, memory: LayerMemory, n_covered: int, n_planted: int, seed: int) -> Array:
    """Overwrite far keys so that each is the best key of all for a query of one head; returns their ids (H, N), -1 for
    queries without one.

    A key has its query's direction, and is just long enough. Each head gets n_planted, or fewer if its queries are much
    alike or the n_covered keys of an index few. `memory` must not be forked any more: forks share what was.
    """
    H, N, _ = held.queries.shape
    keys, first = memory.store.keys(), memory.split.sink_stop
    R, ids = H // len(keys), np.full((H, N), -1, np.int32)
    rng = np.random.default_rng([seed, 0x9F1])
    for g, head_keys in enumerate(keys):
        heads = slice(g * R, (g + 1) * R)
        queries = held.queries[heads].float()
        r, t = _unlike(queries, min(n_planted, n_covered // (_ROOM * R)))
        best, mean = held.best[heads][r, t], held.mean[heads][r, t]
        places = rng.permutation(n_covered)[: len(r)]
        head_keys[first + torch.from_numpy(places)] = _winners(queries[r, t], best, mean).to(keys.dtype)
        ids[g * R + r, t] = places
    return ids


def _unlike(queries: Tensor, most: int) -> tuple[Array, Array]:
    """Heads and numbers of the queries (R, N, D) that get a key: `most` per head, none too much like another."""
    R, N, _ = queries.shape
    units = torch.nn.functional.normalize(queries, dim=-1)
    chosen: list[tuple[int, int]] = []
    counts = [0] * R
    for t in range(N):
        for r in range(R):
            others = units[[i for i, _ in chosen], [j for _, j in chosen]]
            if counts[r] < most and not (others @ units[r, t] > ALIKE).any():
                chosen.append((r, t))
                counts[r] += 1
    return tuple(np.array(chosen, np.int64).reshape(-1, 2).T)  # type: ignore[return-value]


def _winners(queries: Tensor, best: Tensor, mean: Tensor) -> Tensor:
    """For each of the queries (n, D) a key in its direction that beats the best key so far, and the other winners."""
    units = torch.nn.functional.normalize(queries, dim=-1)
    sizes = (best.clamp_min(0) + MARGIN * (best - mean)) / queries.norm(dim=-1)
    alike = (units @ units.T).fill_diagonal_(0)
    # Longer keys may beat others, which must grow, too; no query is so much like another that this goes on for ever.
    for _ in sizes:
        sizes = torch.maximum(sizes, (1 + APART) * (alike * sizes).amax(1))
    return units * sizes[:, None]
