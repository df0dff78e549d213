"""Keys, values and queries with the properties of a real attention layer, made from a seed.

Gaussian vectors flatter or fool an index: their attention is flat and their queries lie among the keys. Here a token
has a word (Zipf), a topic (by passage) and a slow drift; keys are a low-rank image of that, plus a shared mean, under
real rotary position encoding; queries ask for the content of an earlier token, from far outside the keys' distribution,
as sharply as wanted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Softmax mass that the best 100 keys of a query hold on average; the paper reports 89 % for 1000 of 100,000.
TOP_MASS = 0.9

# Distance of queries from the keys, in the keys' own standard deviations, over that of the keys themselves.
DISTANCE_RATIO = 7.0

ROPE_BASE = 500_000.0

_TOP = 100
_N_WORDS = 4096
_N_TOPICS = 64
_PASSAGE = 256
_DRIFT = 1024

# Keys differ most by where they stand (topic and drift), queries mostly ask what was said (the word): neighbours among
# keys are therefore not neighbours for a query, which is what defeats clustering. Standard deviations of the parts:
_TOPIC, _SLOW, _WORD, _FRESH = 2.0, 1.5, 1.0, 0.5

# How much queries care where a key stands, against what it says.
_GLANCE = 0.15

# Share of the content's directions that tell where.
_WHERE = 3

# Standard deviation of keys in every direction: what is left of the directions that carry no content.
_FLOOR = 0.3

# Heads of a group each take the group's target this often, else their own.
_SHARED = 0.9

# Queries and keys that calibration looks at.
_PROBES, _STRIDE = 24, 8


class Vectors(NamedTuple):
    """One layer's vectors, after rotary encoding, of one dtype.

    keys, values: (G, S, D). prefill_queries: (H, T, D), asked at positions spread over the context. queries:
    (H, T', D), asked at the positions right after it. Query head h reads KV head h // (H // G).
    """

    keys: Tensor
    prefill_queries: Tensor
    queries: Tensor
    values: Tensor


class _Text(NamedTuple):
    """What stands where, for all heads of a layer: word (S,), topic (S,), positions of the queries' targets (T,)."""

    words: Tensor
    topics: Tensor
    positions: Tensor
    targets: Tensor


def shaped(
    S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype = torch.float32
) -> Vectors:
    """Vectors of a layer with S keys; the same arguments give the same vectors.

    H query heads over G KV heads of dimension D (even), n_prefill queries from inside the context and n_heldout from
    after it, drawn by the same process and never the same. The temperature of each head is set so that its best 100
    keys (a tenth of the keys, if there are fewer than 1000) hold 90 % of the softmax mass at scale D ** -0.5.
    Raises ValueError for shapes that no attention layer has.
    """
    _check(S, H, G, D, n_prefill, n_heldout)
    make = torch.Generator().manual_seed(seed)
    text = _write_text(S, n_prefill, n_heldout, make)
    rotary = _rotary(torch.arange(S), D)
    query_rotary = _rotary(text.positions, D)
    keys, values = torch.empty((G, S, D), dtype=dtype), torch.empty((G, S, D), dtype=dtype)
    queries = torch.empty((H, n_prefill + n_heldout, D), dtype=dtype)
    R = H // G
    for g in range(G):
        head = _KeyHead(text, D, make)
        keys_g = head.keys(rotary, make)
        keys[g], values[g] = keys_g, head.values(make)
        spread = _Spread.of(keys_g)
        for h in range(g * R, (g + 1) * R):
            queries[h] = _sharpen(head.queries(query_rotary, make), keys_g, spread, make)
    return Vectors(keys, queries[:, :n_prefill], queries[:, n_prefill:], values)


def measure(vectors: Vectors, n_queries: int = 64) -> dict[str, float]:
    """The properties that `shaped` promises, as found in up to n_queries held-out queries per head.

    top_mass: softmax mass of the best 100 keys. distance_ratio: Mahalanobis distance of queries from the keys, over the
    keys' own. effective_rank: exponential of the entropy of the key covariance's spectrum. mean_share: share of the
    keys' energy in their mean. neighbour_cosine and random_cosine: centred keys one apart, and anywhere.
    group_overlap: share of the best 100 that two heads of a group have in common. Each is a mean over heads.
    """
    H, G = len(vectors.queries), len(vectors.keys)
    R = H // G
    found: dict[str, list[float]] = {}
    for g in range(G):
        keys = vectors.keys[g].float()
        spread = _Spread.of(keys)
        best = []
        for h in range(g * R, (g + 1) * R):
            queries = vectors.queries[h, :n_queries].float()
            mass, ids = _top_mass(queries, keys)
            best.append(ids)
            _note(found, top_mass=mass, distance_ratio=float(spread.distance(queries).mean() / spread.own))
        share = spread.values / spread.values.sum()
        _note(
            found,
            effective_rank=float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())),
            mean_share=float(spread.mean.square().sum() / keys.square().sum(1).mean()),
            **_cosines(keys - spread.mean),
        )
        pairs = [(a, b) for a in range(R) for b in range(a)]
        for a, b in pairs:
            _note(found, group_overlap=_overlap(best[a], best[b]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _check(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int) -> None:
    if min(S, H, G, D, n_prefill, n_heldout) < 1:
        raise ValueError(
            f"S, H, G, D, n_prefill and n_heldout must be at least 1, got {S}, {H}, {G}, {D}, {n_prefill}, {n_heldout}"
        )
    if H % G:
        raise ValueError(f"H must be a multiple of G ({G}), got {H}")
    if D % 16:
        raise ValueError(f"D must be a multiple of 16, got {D}")


def _write_text(S: int, n_prefill: int, n_heldout: int, make: torch.Generator) -> _Text:
    frequency = 1.0 / (torch.arange(_N_WORDS) + 10.0)
    words = torch.multinomial(frequency, S, replacement=True, generator=make)
    passages = torch.randint(_N_TOPICS, (S // _PASSAGE + 1,), generator=make)
    inside = torch.linspace(0, S - 1, n_prefill).long()
    after = S + torch.arange(n_heldout)
    positions = torch.cat([inside, after])
    # A query asks for a token that stands before it.
    reach = positions.clamp(1, S)
    targets = (torch.rand(len(positions), generator=make) * reach).long()
    return _Text(words, passages[torch.arange(S) // _PASSAGE], positions, targets)


class _KeyHead:
    """How one KV head sees the text."""

    def __init__(self, text: _Text, D: int, make: torch.Generator) -> None:
        S, rank = len(text.words), 3 * D // 8
        self._text, self._dim = text, D
        n_where = rank // _WHERE
        self._words = _WORD * _randn(make, _N_WORDS, rank - n_where)
        self._topics = _TOPIC * _randn(make, _N_TOPICS, n_where)
        knots = _SLOW * _randn(make, 1, n_where, S // _DRIFT + 2)
        self._slow = torch.nn.functional.interpolate(knots, size=S, mode="linear")[0].T
        # Rotary planes turn ever slower. What is said must match across the context, so it lives in the slowest quarter
        # of them; where it stands in the next; how near it is in faster ones. Trained models do the same.
        self._image = torch.zeros(rank, D)
        self._image[:n_where, _planes(D, 4, 6)] = _orthogonal(make, D // 4)[:n_where]
        self._image[n_where:, _planes(D, 6, 8)] = _orthogonal(make, D // 4)
        self._mean = 0.3 * _randn(make, D)
        self._mean[_planes(D, 6, 8)] *= 8
        self._nearness = torch.zeros(D)
        self._nearness[_planes(D, 2, 4)] = 0.5

    def _content(self, positions: Tensor, make: torch.Generator) -> Tensor:
        """(n, rank) of the tokens at `positions`: where they stand, then what they say; with what is chance."""
        where = self._topics[self._text.topics[positions]] + self._slow[positions]
        content = torch.cat([where, self._words[self._text.words[positions]]], dim=1)
        return content.add_(_randn(make, *content.shape), alpha=_FRESH)

    def keys(self, rotary: tuple[Tensor, Tensor], make: torch.Generator) -> Tensor:
        """(S, D) float32."""
        S = len(self._text.words)
        base = _FLOOR * _randn(make, S, self._dim) + self._mean + self._nearness
        return _rotate(base.addmm_(self._content(torch.arange(S), make), self._image), rotary)

    def values(self, make: torch.Generator) -> Tensor:
        """(S, D) float32: what a word means, and what is particular about this one."""
        meanings = _randn(make, _N_WORDS, self._dim)
        return meanings[self._text.words] + 0.5 * _randn(make, len(self._text.words), self._dim)

    def queries(self, rotary: tuple[Tensor, Tensor], make: torch.Generator) -> Tensor:
        """(T, D) float32 of one query head, which has its own emphasis and, sometimes, its own target."""
        targets = self._text.targets
        own = (torch.rand(len(targets), generator=make) * self._text.positions.clamp(1, len(self._text.words))).long()
        mine = torch.where(torch.rand(len(targets), generator=make) < _SHARED, targets, own)
        emphasis = torch.exp(0.3 * _randn(make, len(self._image)))
        emphasis[: self._topics.shape[1]] *= _GLANCE
        wanted = (self._content(mine, make) * emphasis) @ self._image
        return _rotate(wanted + self._nearness, rotary)


class _Spread(NamedTuple):
    """Mean and covariance of a head's keys, as eigenvalues (ascending) and eigenvectors; `own` is the keys' mean
    Mahalanobis distance."""

    mean: Tensor
    values: Tensor
    axes: Tensor
    own: float

    @classmethod
    def of(cls, keys: Tensor) -> "_Spread":
        some = keys[:: max(1, len(keys) // 8192)]
        mean = some.mean(0)
        values, axes = torch.linalg.eigh(torch.cov(some.T, correction=0) + 1e-6 * torch.eye(keys.shape[1]))
        bare = cls(mean, values, axes, 1.0)
        return bare._replace(own=float(bare.distance(some).mean()))

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance of the rows of x from the keys."""
        return self.whitened(x).norm(dim=1)

    def whitened(self, x: Tensor) -> Tensor:
        """The rows of x in units of the keys' standard deviations, from their mean."""
        return (x - self.mean) @ self.axes / self.values.sqrt()


def _sharpen(queries: Tensor, keys: Tensor, spread: _Spread, make: torch.Generator) -> Tensor:
    """Give queries their temperature, and move them away from the keys in directions where keys hardly vary."""
    away = _displacement(queries.shape[1], spread, make, len(queries))
    # The two depend on each other; a sample of the keys is enough to get near, the last step is exact.
    some = keys[:: max(1, len(keys) // 16384)]
    moved = queries
    for _ in range(3):
        queries = queries * _temperature(moved, some, len(keys))
        moved = queries + away * _distance_to_go(queries, away, spread)
    return moved * _temperature(moved, keys, len(keys))


def _displacement(D: int, spread: _Spread, make: torch.Generator, n: int) -> Tensor:
    """(n, D): one direction for the head and a little of its own for each query, among the flattest quarter."""
    flat = spread.axes[:, : D // 4]
    together = _randn(make, 1, D // 4) + 0.5 * _randn(make, n, D // 4)
    return together @ flat.T / math.sqrt(D // 4)


def _distance_to_go(queries: Tensor, away: Tensor, spread: _Spread) -> float:
    """The m for which queries + m * away have the distance wanted, in the mean square; 0 if they have it already."""
    some = torch.linspace(0, len(queries) - 1, min(len(queries), 128)).long()
    here, step = spread.whitened(queries[some]), (away[some] @ spread.axes) / spread.values.sqrt()
    a = step.square().sum(1).mean()
    b = (here * step).sum(1).mean()
    c = here.square().sum(1).mean() - (DISTANCE_RATIO * spread.own) ** 2
    return float((-b + (b * b - a * c).clamp_min(0).sqrt()) / a) if c < 0 else 0.0


def _temperature(queries: Tensor, keys: Tensor, n_keys: int) -> float:
    """The factor by which queries must grow so that their best keys hold `TOP_MASS`; by bisection on its logarithm.

    keys: all `n_keys` of them, or an even sample. The best ones are looked at all, of the rest every eighth.
    """
    probes = queries[torch.linspace(0, len(queries) - 1, min(len(queries), _PROBES)).long()]
    scores = probes @ keys.T * keys.shape[1] ** -0.5
    n_top = max(1, _n_top(n_keys) * len(keys) // n_keys)
    best = scores.topk(n_top, dim=1).values
    stride = _STRIDE if len(keys) > 512 * _STRIDE else 1
    sample = scores[:, ::stride]
    rest = torch.where(sample < best[:, -1:], sample, -torch.inf) - best[:, :1]
    best = best - best[:, :1]
    low, high = -6.0, 6.0
    for _ in range(16):
        middle = (low + high) / 2
        factor = math.exp(middle)
        top = (best * factor).exp().sum(1)
        mass = (top / (top + stride * (rest * factor).exp().sum(1))).mean()
        low, high = (middle, high) if mass < TOP_MASS else (low, middle)
    return math.exp(low)


def _n_top(S: int) -> int:
    return min(_TOP, max(1, S // 10))


def _randn(make: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=make)


def _orthogonal(make: torch.Generator, n: int) -> Tensor:
    return torch.linalg.qr(_randn(make, n, n))[0]


def _planes(D: int, first: int, last: int) -> Tensor:
    """Dimensions of the rotary planes from `first` to `last` eighths, fastest first."""
    planes = torch.arange(first * D // 16, last * D // 16)
    return torch.cat([planes, planes + D // 2])


def _rotary(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, D / 2)."""
    speeds = ROPE_BASE ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = (positions.double()[:, None] * speeds) % (2 * math.pi)
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary encoding of (n, D), in the halves layout of Llama."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


def _top_mass(queries: Tensor, keys: Tensor) -> tuple[float, Tensor]:
    weights = (queries @ keys.T * keys.shape[1] ** -0.5).softmax(1)
    best = weights.topk(_n_top(len(keys)), dim=1)
    return float(best.values.sum(1).mean()), best.indices


def _overlap(a: Tensor, b: Tensor) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(2).float().mean())


def _cosines(centred: Tensor) -> dict[str, float]:
    some = centred[:20_000]
    if len(some) < 4:
        return {}
    anywhere = centred[torch.arange(len(some)) * 7919 % len(centred)]
    cosine = torch.nn.functional.cosine_similarity
    return {
        "neighbour_cosine": float(cosine(some[:-1], some[1:]).mean()),
        "random_cosine": float(cosine(some, anywhere)[1:].mean()),
    }


def _note(found: dict[str, list[float]], **values: float) -> None:
    for name, value in values.items():
        found.setdefault(name, []).append(value)
