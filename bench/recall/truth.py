"""What a search should have found and attention over everything, for the held-out queries; in float32."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.bench.vectors.sources import Vectors
from retrieval_attn.index import SearchResult

# Bytes of scores held at a time.
_BLOCK_BYTES = 1 << 28

# Two ways of summing an inner product differ by less than this part of the lengths' product.
_ROUNDING = 1e-5


class Truth(NamedTuple):
    """For every head and held-out query (H, T): the score of the k-th best key, the log of the softmax denominator,
    what a score may be off by, the best keys' mass; and the output (H, T, Dv)."""

    worst: Array
    lse: Array
    slack: Array
    best_mass: Array
    out: Tensor
    k: int
    scale: float

    @classmethod
    def of(cls, vectors: Vectors, k: int) -> "Truth":
        """The truth about `vectors` for a search of k keys (all of them, if there are fewer)."""
        G, S, D = vectors.keys.shape
        H, T, _ = vectors.queries.shape
        k, R, scale = min(k, S), H // G, D**-0.5
        parts = []
        for g in range(G):
            keys, values = vectors.keys[g].float(), vectors.values[g].float()
            length = keys.norm(dim=1).mean()
            rows = vectors.queries[g * R : (g + 1) * R].float().reshape(R * T, D)
            parts += [
                _block(block, keys, values, k, scale, length) for block in rows.split(_BLOCK_BYTES // (4 * S) + 1)
            ]
        worst, lse, slack, best = (torch.cat(x).reshape(H, T).numpy() for x in list(zip(*parts, strict=True))[:4])
        out = torch.cat([part[4] for part in parts]).reshape(H, T, -1)
        return cls(worst, lse, slack, best, out, k, scale)

    def recall(self, hits: SearchResult, t: int) -> Array:
        """(H,): share of the k best keys found for query t. A key as good as the k-th best is as good as that one."""
        enough = hits.scores[:, 0] >= (self.worst[:, t] - self.slack[:, t])[:, None]
        return np.minimum(np.sum(enough & (hits.ids[:, 0] >= 0), axis=1) / self.k, 1.0)

    def mass(self, hits: SearchResult, t: int) -> Array:
        """(H,): the keys' share of the softmax over all keys."""
        scores = np.where(hits.ids[:, 0] >= 0, hits.scores[:, 0], -np.inf)
        return np.exp(scores * self.scale - self.lse[:, t, None]).sum(axis=1)

    def error(self, out: Tensor, t: int) -> Array:
        """(H,): relative L2 distance of an output (H, Dv) from attention over all keys."""
        wanted = self.out[:, t]
        return ((out.float() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-12)).numpy()


def _block(queries: Tensor, keys: Tensor, values: Tensor, k: int, scale: float, length: Tensor) -> tuple[Tensor, ...]:
    scores = queries @ keys.T
    best = scores.topk(k, dim=1).values
    scores *= scale
    lse = scores.logsumexp(1)
    mass = (best * scale - lse[:, None]).exp().sum(1)
    return best[:, -1], lse, _ROUNDING * queries.norm(dim=1) * length, mass, (scores - lse[:, None]).exp() @ values


def check_hits(hits: SearchResult, query: Tensor, keys: Tensor) -> str | None:
    """What is wrong with hits (H, 1, k) of an index without lift for query (H, 1, D); None if nothing is."""
    H, G = len(query), len(keys)
    for h in range(H):
        ids, scores = hits.ids[h, 0], hits.scores[h, 0]
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        if len(set(ids.tolist())) < len(ids):
            return f"a key was found twice for head {h}"
        if len(ids) and ids.max() >= keys.shape[1]:
            return f"key {ids.max()} was found for head {h}, but there are {keys.shape[1]}"
        rows = keys[h // (H // G)][torch.from_numpy(ids).long()].float()
        wanted = (rows @ query[h, 0]).numpy()
        allowed = _ROUNDING * float(query[h, 0].norm()) * rows.norm(dim=1).numpy() + 1e-6
        if (np.abs(wanted - scores) > allowed).any():
            return f"scores of head {h} differ from the inner products of the keys named"
    return None
