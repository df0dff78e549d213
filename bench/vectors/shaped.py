"""Keys, values and queries with the properties of a large model's attention layer, made from a seed.

Gaussian vectors flatter or fool an index: their attention is flat and their queries lie among the keys. Here a token
has a word (Zipf), a topic (by passage) and a slow drift; keys are a low-rank image of that, plus a shared mean, under
real rotary position encoding; some keys are wanted by every query; queries ask for the content of an earlier token,
from far outside the keys' distribution, as sharply as wanted; consecutive decode steps ask for much the same.
Properties, ours and real ones, side by side: bench/vectors/measure.py. One is known to be off: the best keys of a query
are less often one another's neighbours (`cohesion`) than in the embedded model, which makes searches harder.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.bench.vectors.base import Spread, Vectors, check_shape
from retrieval_attn.bench.vectors.sharpen import sharpen

ROPE_BASE = 500_000.0

_N_WORDS = 4096
_N_TOPICS = 64
_PASSAGE = 256
_DRIFT = 1024

# Keys differ most by where they stand (topic and drift), queries mostly ask what was said (the word): neighbours among
# keys are therefore not neighbours for a query, which is what defeats clustering. Standard deviations of the parts:
_TOPIC, _SLOW, _WORD, _FRESH = 2.0, 1.5, 1.0, 0.5

# How much queries care where a key stands, against what it says; and after a drift.
_GLANCE, _GLANCE_LATE = 0.15, 7.0

# Every head cares for some directions of the content more than for others: standard deviation of the logarithm. The
# rank of queries is then 0.37 of D, and a held-out query has a cosine of 0.51 with the most similar one of the prefill;
# the embedded model at 128K, by layer, has 0.33 to 0.50 and 0.52 to 0.70.
_EMPHASIS = 0.5

# Share of the content's directions that tell where.
_WHERE = 3

# Standard deviation of keys in every direction: what is left of the directions that carry no content.
_FLOOR = 0.3

# Heads of a group each take the group's target this often, else their own.
_SHARED = 0.9

# Decode steps in a run, and how much of what a step wants is what the whole run wants (a correlation). The best 1000
# keys of its first step then hold 0.59 of the mass of the others, consecutive steps share 0.17 of their best 100; the
# embedded model has 0.21 to 0.56 and 0.06 to 0.31, RetrievalAttention reports 0.71 for the first, near keys included.
_RUN, _PERSISTENCE = 8, 0.7

# Keys that all queries of a head want: their share, and how strongly, as a multiple of the keys' word part. Of the
# best 100, 0.57 then fall on the 1 % of keys wanted most (embedded model: 0.64 to 0.96).
_HUBS, _HUB_PULL = 1e-3, 1.0

# Keys made at a time: bounds what is held in float32.
_BLOCK = 1 << 16


class _Text(NamedTuple):
    """What stands where, for all heads of a layer: word (S,), topic (S,), how much of a hub (S,); for the queries, in
    order, the position (T,), the token each wants (T,) and the token its run wants (T,)."""

    words: Tensor
    topics: Tensor
    hubs: Tensor
    positions: Tensor
    targets: Tensor
    themes: Tensor


def shaped(
    S: int,
    H: int,
    G: int,
    D: int,
    n_prefill: int,
    n_heldout: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    drift: bool = False,
) -> Vectors:
    """Vectors of a layer with S keys; the same arguments give the same vectors.

    H query heads over G KV heads of dimension D (a multiple of 16), n_prefill queries from inside the context and
    n_heldout from after it, in runs of 8 decode steps. The temperature of each head is set so that its best 100 keys (a
    tenth of the keys, if there are fewer than 1000) hold 90 % of the softmax mass at scale D ** -0.5.
    drift: held-out queries ask where a token stands and hardly what it says, in a manner and from a place of their own;
    prefill queries ask as always.
    Raises ValueError for shapes that no attention layer has.
    """
    check_shape(S, H, G, D, n_prefill, n_heldout)
    make = torch.Generator().manual_seed(seed)
    text = _write_text(S, n_prefill, n_heldout, make)
    rotary = _rotary(text.positions, D)
    keys, values = torch.empty((G, S, D), dtype=dtype), torch.empty((G, S, D), dtype=dtype)
    queries = torch.empty((H, n_prefill + n_heldout, D), dtype=dtype)
    R = H // G
    for g in range(G):
        head = _KeyHead(text, D, make)
        head.fill(keys[g], values[g], make)
        keys_g = keys[g].float()
        spread = Spread.of(keys_g)
        for h in range(g * R, (g + 1) * R):
            asked = head.queries(rotary, make)
            if drift:
                queries[h, :n_prefill] = sharpen(asked[:n_prefill], keys_g, spread, make)
                late = head.queries(rotary, make, _GLANCE_LATE)[n_prefill:]
                queries[h, n_prefill:] = sharpen(late, keys_g, spread, make)
            else:
                queries[h] = sharpen(asked, keys_g, spread, make)
    runs = torch.arange(n_heldout) // _RUN
    return Vectors(keys, queries[:, :n_prefill], queries[:, n_prefill:], values, runs)


def _write_text(S: int, n_prefill: int, n_heldout: int, make: torch.Generator) -> _Text:
    frequency = 1.0 / (torch.arange(_N_WORDS) + 10.0)
    words = torch.multinomial(frequency, S, replacement=True, generator=make)
    passages = torch.randint(_N_TOPICS, (S // _PASSAGE + 1,), generator=make)
    strength = torch.empty(S).exponential_(generator=make)
    hubs = strength * (torch.rand(S, generator=make) < _HUBS)
    inside = torch.linspace(0, S - 1, n_prefill).long()
    after = S + torch.arange(n_heldout)
    positions = torch.cat([inside, after])
    # A query asks for a token that stands before it.
    reach = positions.clamp(1, S)
    targets, themes = ((torch.rand(len(positions), generator=make) * reach).long() for _ in range(2))
    later = torch.arange(n_heldout)
    themes[n_prefill:] = themes[n_prefill:][later // _RUN * _RUN]
    return _Text(words, passages[torch.arange(S) // _PASSAGE], hubs, positions, targets, themes)


class _KeyHead:
    """How one KV head sees the text."""

    def __init__(self, text: _Text, D: int, make: torch.Generator) -> None:
        S, rank = len(text.words), 3 * D // 8
        self._text, self._dim = text, D
        n_where = rank // _WHERE
        self._words = _WORD * _randn(make, _N_WORDS, rank - n_where)
        self._topics = _TOPIC * _randn(make, _N_TOPICS, n_where)
        self._meanings = _randn(make, _N_WORDS, D)
        self._knots = _SLOW * _randn(make, S // _DRIFT + 2, n_where)
        # Rotary planes turn ever slower. What is said must match across the context, so it lives in the slowest quarter
        # of them; where it stands in the next; how near it is in faster ones. Trained models do the same.
        self._image = torch.zeros(rank, D)
        self._image[:n_where, _planes(D, 4, 6)] = _orthogonal(make, D // 4)[:n_where]
        self._image[n_where:, _planes(D, 6, 8)] = _orthogonal(make, D // 4)
        self._mean = 0.3 * _randn(make, D)
        self._mean[_planes(D, 6, 8)] *= 8
        self._nearness = torch.zeros(D)
        self._nearness[_planes(D, 2, 4)] = 0.5
        # The slowest planes of all: a hub is one from anywhere.
        self._pull = torch.zeros(D)
        slowest = _planes(D, 7, 8)
        self._pull[slowest] = _randn(make, len(slowest)) / math.sqrt(len(slowest))

    def _content(self, positions: Tensor, make: torch.Generator) -> Tensor:
        """(n, rank) of the tokens at `positions`: where they stand, then what they say; with what is chance."""
        knot, share = positions // _DRIFT, (positions % _DRIFT / _DRIFT)[:, None]
        slow = torch.lerp(self._knots[knot], self._knots[knot + 1], share)
        where = self._topics[self._text.topics[positions]] + slow
        content = torch.cat([where, self._words[self._text.words[positions]]], dim=1)
        return content.add_(_randn(make, *content.shape), alpha=_FRESH)

    def fill(self, keys: Tensor, values: Tensor, make: torch.Generator) -> None:
        """Write keys and values (S, D)."""
        for positions in torch.arange(len(keys)).split(_BLOCK):
            here = slice(int(positions[0]), int(positions[-1]) + 1)
            block = _FLOOR * _randn(make, len(positions), self._dim) + self._mean + self._nearness
            block.addmm_(self._content(positions, make), self._image)
            block.addcmul_(self._text.hubs[here, None], _HUB_PULL * self._pull)
            keys[here] = _rotate(block, _rotary(positions, self._dim))
            # What a word means, and what is particular about this one.
            values[here] = self._meanings[self._text.words[here]] + 0.5 * _randn(make, len(positions), self._dim)

    def queries(self, rotary: tuple[Tensor, Tensor], make: torch.Generator, glance: float = _GLANCE) -> Tensor:
        """(T, D) float32 of one query head, which has its own emphasis and, sometimes, its own target."""
        text = self._text
        own = (torch.rand(len(text.targets), generator=make) * text.positions.clamp(1, len(text.words))).long()
        mine = torch.where(torch.rand(len(own), generator=make) < _SHARED, text.targets, own)
        emphasis = torch.exp(_EMPHASIS * _randn(make, len(self._image)))
        emphasis[: self._topics.shape[1]] *= glance
        wanted = math.sqrt(_PERSISTENCE) * self._content(text.themes, make)
        wanted += math.sqrt(1 - _PERSISTENCE) * self._content(mine, make)
        return _rotate((wanted * emphasis) @ self._image + self._nearness + _HUB_PULL * self._pull, rotary)


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
