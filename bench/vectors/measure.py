"""What benchmark vectors are like: the properties that decide how hard a search is, measured alike for every source."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from retrieval_attn.bench.vectors.base import Spread, Vectors

# What each property is, in the order of the table, with what is published about large models.
PROPERTIES = {
    "top_mass": "softmax mass of the best 100 keys",
    "top1000_mass": "of the best 1000; RetrievalAttention: 0.89 at 100K",
    "frozen_mass": "of the best 1000 of the answer's first query, for its later ones; RetrievalAttention: 0.71",
    "distance_ratio": "Mahalanobis distance of queries from the keys, over the keys' own; RetrievalAttention: over 10",
    "effective_rank": "exponential of the entropy of the key covariance's spectrum, over D",
    "query_rank": "the same of the prefill queries",
    "mean_share": "share of the keys' energy in their mean",
    "neighbour_cosine": "of centred keys one apart",
    "random_cosine": "of centred keys anywhere",
    "group_overlap": "share of the best 100 that two heads of a group have in common",
    "consecutive_overlap": "share of the best 100 that two consecutive queries have in common",
    "hub_share": "share of all best 100 that falls on the 1 % of keys wanted most",
    "known_share": "share of the best 100 that was among the best 100 of one of 256 prefill queries of the head",
    "asked_cosine": "of a held-out query and the prefill query most like it, both centred",
    "cohesion": "share of the 10 keys nearest to one of the best 100 that are among the best 100",
}

_TOP, _FROZEN, _ASKED = 100, 1000, 256

# Queries whose best keys are asked for their neighbours, and how many of these.
_COHERENT, _NEAREST = 4, 10


def measure(vectors: Vectors, n_queries: int = 64) -> dict[str, float]:
    """The properties named in `PROPERTIES`, as found in up to n_queries held-out queries per head.

    Each is a mean over heads (over pairs of heads, of consecutive queries). The best 100 are a tenth of the keys if
    there are fewer than 1000, the best 1000 likewise a half. A property that nothing can be said about is left out.
    """
    G = len(vectors.keys)
    R = len(vectors.queries) // G
    found: dict[str, list[float]] = {}
    for g in range(G):
        keys = vectors.keys[g].float()
        spread = Spread.of(keys)
        D = keys.shape[1]
        _note(found, effective_rank=spread.effective_rank / D, **_key_properties(keys, spread.mean))
        best = []
        for h in range(g * R, (g + 1) * R):
            queries = vectors.queries[h, :n_queries].float()
            weights = _weights(queries, keys)
            ids = weights.topk(_n_top(len(keys)), dim=1).indices
            best.append(ids)
            if spread.own > 0:
                _note(found, distance_ratio=float(spread.distance(queries).mean() / spread.own))
            _note(found, **_mass(weights, ids, vectors.runs[: len(queries)]), hub_share=_hub_share(ids, len(keys)))
            # The first head of a group speaks for it: this one costs as much as all the others together.
            if h == g * R:
                _note(found, **_familiarity(vectors.prefill_queries[h].float(), queries, keys, ids))
                _note(found, **_cohesion(keys, ids))
        for a in range(R):
            for b in range(a):
                _note(found, group_overlap=_overlap(best[a], best[b]))
    return {name: sum(found[name]) / len(found[name]) for name in PROPERTIES if name in found}


def properties_table(sources: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per property, a column per source."""
    lines = ["| property | " + " | ".join(sources) + " |", "| --- |" + " ---: |" * len(sources)]
    for name, meaning in PROPERTIES.items():
        cells = [f"{found[name]:.3g}" if name in found else "" for found in sources.values()]
        lines.append(f"| {name}: {meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _n_top(S: int) -> int:
    return min(_TOP, max(1, S // 10))


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.T * keys.shape[1] ** -0.5).softmax(1)


def _key_properties(keys: Tensor, mean: Tensor) -> dict[str, float]:
    energy = keys.square().sum(1).mean().clamp_min(1e-12)
    some = keys[:20_000] - mean
    found = {"mean_share": float(mean.square().sum() / energy)}
    if len(some) >= 4:
        anywhere = keys[torch.arange(len(some)) * 7919 % len(keys)] - mean
        found["neighbour_cosine"] = float(cosine_similarity(some[:-1], some[1:]).mean())
        found["random_cosine"] = float(cosine_similarity(some, anywhere)[1:].mean())
    return found


def _mass(weights: Tensor, ids: Tensor, runs: Tensor) -> dict[str, float]:
    """weights (T, S), the best ids (T, n), runs (T,)."""
    n_frozen = min(_FROZEN, max(1, weights.shape[1] // 2))
    most, wide = weights.topk(n_frozen, dim=1)
    found = {
        "top_mass": float(weights.gather(1, ids).sum(1).mean()),
        "top1000_mass": float(most.sum(1).mean()),
    }
    later = torch.nonzero(runs[1:] == runs[:-1])[:, 0] + 1
    if len(later):
        firsts = torch.searchsorted(runs.contiguous(), runs[later].contiguous())
        found["frozen_mass"] = float(weights[later].gather(1, wide[firsts]).sum(1).mean())
        found["consecutive_overlap"] = _overlap(ids[later], ids[later - 1])
    return found


def _familiarity(asked: Tensor, queries: Tensor, keys: Tensor, ids: Tensor) -> dict[str, float]:
    some = asked[torch.linspace(0, len(asked) - 1, min(len(asked), _ASKED)).long()]
    known = torch.zeros(len(keys), dtype=torch.bool)
    for block in some.split(32):
        known[(block @ keys.T).topk(ids.shape[1], dim=1).indices] = True
    mean = asked.mean(0)
    cosines = cosine_similarity((queries - mean)[:, None], (asked - mean)[None], dim=2)
    return {
        "known_share": float(known[ids].float().mean()),
        "asked_cosine": float(cosines.amax(1).mean()),
        "query_rank": Spread.of(asked).effective_rank / asked.shape[1],
    }


def _cohesion(keys: Tensor, ids: Tensor) -> dict[str, float]:
    if len(keys) <= 2 * _NEAREST:
        return {}
    lengths, shares = keys.square().sum(1), []
    for best in ids[torch.linspace(0, len(ids) - 1, min(len(ids), _COHERENT)).long()]:
        distances = lengths - 2 * keys[best] @ keys.T
        distances[torch.arange(len(best)), best] = torch.inf
        nearest = distances.topk(_NEAREST, dim=1, largest=False).indices
        shares.append(torch.isin(nearest, best).float().mean())
    return {"cohesion": float(torch.stack(shares).mean())}


def _hub_share(ids: Tensor, S: int) -> float:
    counts = torch.bincount(ids.flatten(), minlength=S)
    return float(counts.topk(max(1, S // 100)).values.sum() / ids.numel())


def _overlap(a: Tensor, b: Tensor) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(2).float().mean())


def _note(found: dict[str, list[float]], **values: float) -> None:
    for name, value in values.items():
        found.setdefault(name, []).append(value)
