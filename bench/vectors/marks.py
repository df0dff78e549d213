"""What the keys of a prompt are marked with, beside their content, and which queries of a head ask for which marks.

Every mark has dimensions of its own: sinks and hubs one for each kind, the topic of a passage a code, positions planes
that turn with them, as in rotary encoding, some for how near a key is and some for diagonals.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# What a query's mass is shared among. Retrieval is by content; the others are by marks.
PARTS = ("sink", "local", "vertical", "slash", "topic", "retrieval")
N_MARKED = len(PARTS) - 1

# The first tokens are sinks.
N_SINK = 4

# Reach of the local part: what is nearer counts as local. Heads fall off from 16 to 128 tokens on, by a power.
LOCAL = 1024
_NEAREST, _FARTHEST = 16, 128

# Families of hub keys in a KV head, of which each query head wants one; keys in a family; how unlike hubs are (the
# standard deviation of how strongly one is marked).
_FAMILIES, N_HUBS, _UNLIKE = 3, 48, 0.1

# Diagonals of a query head lie a period apart: at its own distance, and at that plus one, two ... periods.
_PERIODS = 4

# Passages of 128 tokens, each on one of 64 topics; queries of a passage want the topic of an earlier one.
PASSAGE, _TOPICS = 128, 64

# How sharply content is asked for, beside what `shaped` does, where 100 keys hold 0.9 of the mass that is retrieved.
# That sharp, it would leave a head one key of its neighbourhood and one of its hubs.
_SOFT = 0.5


class Head(NamedTuple):
    """kind: its name. mix: the shares asked of it, in the order of `PARTS`. family: of hubs. distance, period: of
    diagonals. window: tokens from which on the local part falls off. topics: (passages,) what queries of each want."""

    kind: str
    mix: tuple[float, ...]
    family: int
    distance: int
    period: int
    window: float
    topics: Tensor


class Sizes(NamedTuple):
    """Dimensions of each part of a key: content, then a mark per dimension, topic, then planes (two dimensions each)
    that turn with the position."""

    content: int
    marks: int
    topic: int
    local: int
    slash: int

    @classmethod
    def of(cls, D: int) -> "Sizes":
        return cls(D * 3 // 8 // 16 * 16, 1 + _FAMILIES, D // 8, D * 3 // 32 * 2, D // 8 * 2)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of x (..., D), as views."""
        return x[..., : sum(self)].split(list(self), dim=-1)


class Text:
    """What one KV head marks: which hubs there are, which topic a passage has, which frequencies tell positions."""

    def __init__(self, S: int, make: torch.Generator) -> None:
        self.S = S
        self.hubs = torch.full((S,), -1)
        some = torch.randperm(S, generator=make)[: _FAMILIES * N_HUBS]
        self.hubs[some] = torch.arange(len(some)) % _FAMILIES
        n_passages = S // PASSAGE + 1
        self.topics = torch.randint(_TOPICS, (n_passages,), generator=make)
        self.period = max(2 * LOCAL, S // _PERIODS) + int(torch.randint(64, (), generator=make))
        self._harmonics = torch.randint(1, self.period, (4096,), generator=make)
        self._codes = torch.randn((_TOPICS, 4096), generator=make)

    def mark(self, keys: Tensor, said: Tensor, sizes: Sizes, make: torch.Generator) -> None:
        """Write the keys (S, D): content (S, any), and marks of length 1."""
        content, marks, topic, local, slash = sizes.split(keys)
        content.copy_(said)
        # Sinks and hubs say nothing: what a query retrieves moves their attention neither way.
        dull = (torch.arange(self.S) < N_SINK) | (self.hubs >= 0)
        content[dull] = said.mean(0).to(keys.dtype)
        marks[:N_SINK, 0] = 1
        hubs = self.hubs >= 0
        strength = 1 + _UNLIKE * torch.randn(int(hubs.sum()), generator=make)
        marks[hubs, 1 + self.hubs[hubs]] = strength.to(keys.dtype)
        position = torch.arange(self.S)
        topic.copy_(self._code(self.topics[position // PASSAGE], sizes))
        local.copy_(_turn(position, self._local_speeds(sizes)))
        slash.copy_(_turn(position, self._slash_speeds(sizes)))

    def draw_head(self, kind: str, mix: tuple[float, ...], make: torch.Generator) -> Head:
        log_window = math.log(_NEAREST) + math.log(_FARTHEST / _NEAREST) * torch.rand((), generator=make)
        # Distances lie past what is local, so that the two can be told apart.
        distance = LOCAL + 1 + int(torch.randint(self.period - LOCAL - 1, (), generator=make))
        earlier = (torch.rand(len(self.topics), generator=make) * torch.arange(1, len(self.topics) + 1)).long()
        family = int(torch.randint(_FAMILIES, (), generator=make))
        window, wanted = float(torch.exp(log_window)), self.topics[earlier]
        return Head(kind, mix, family, distance, self.period, window, wanted)

    def ask(self, head: Head, said: Tensor, sizes: Sizes, D: int) -> Tensor:
        """(S, D) float32: queries that give each part a score of 1 where it is wanted most; scores are over sqrt(D)."""
        asked = torch.zeros((self.S, D))
        content, marks, topic, local, slash = sizes.split(asked)
        position = torch.arange(self.S)
        content.copy_(said * (_SOFT / math.sqrt(sizes.content)))
        marks[:, 0] = 1
        marks[:, 1 + head.family] = 1
        topic.copy_(self._code(head.topics[position // PASSAGE], sizes))
        speeds = self._local_speeds(sizes)
        # Planes that turn faster than the window are of no use to this head.
        heard = (2 * math.pi / speeds > 2 * head.window).float()
        local.copy_(_turn(position, speeds) * heard.repeat(2) * len(heard) / heard.sum().clamp_min(1))
        slash.copy_(_turn(position - head.distance, self._slash_speeds(sizes)))
        return asked * math.sqrt(D)

    def _code(self, topics: Tensor, sizes: Sizes) -> Tensor:
        codes = self._codes[:, : sizes.topic]
        return (codes / codes.norm(dim=1, keepdim=True))[topics]

    def _local_speeds(self, sizes: Sizes) -> Tensor:
        """Radians per token, from a turn in 2 * _NEAREST tokens to an eighth of one over the text."""
        n = sizes.local // 2
        share = torch.arange(n, dtype=torch.float64) / max(1, n - 1)
        slowest = 8 * max(self.S, LOCAL)
        return 2 * math.pi / (2 * _NEAREST * (slowest / (2 * _NEAREST)) ** share)

    def _slash_speeds(self, sizes: Sizes) -> Tensor:
        """Whole turns in a period, so that all are back after one."""
        return 2 * math.pi * self._harmonics[: sizes.slash // 2].double() / self.period


def part_of(head: Head, text: Text, positions: Tensor) -> Tensor:
    """(n, S) int64: which of `PARTS` the attention of a query at each of `positions` (n,) to each key belongs to.

    What is of no other part, keys after the query too, is retrieval. A key that could be of two is of the first.
    """
    key = torch.arange(text.S)
    behind = positions[:, None] - key
    along = (behind - head.distance + 1) % head.period <= 2
    claims = (
        (key < N_SINK).expand_as(behind),
        behind < LOCAL,
        (text.hubs == head.family).expand_as(behind),
        along & (behind >= head.distance - 1),
        text.topics[key // PASSAGE] == head.topics[positions // PASSAGE][:, None],
    )
    part = torch.full(behind.shape, N_MARKED)
    for i, claim in reversed(list(enumerate(claims))):
        part[claim & (behind >= 0)] = i
    return part


def part_scores(asked: Tensor, keys: Tensor, sizes: Sizes) -> list[Tensor]:
    """Inner products (n, S) of content, then of each of the other `PARTS`."""
    content, marks, topic, local, slash = ((q, k) for q, k in zip(sizes.split(asked), sizes.split(keys), strict=True))
    first, others = slice(0, 1), slice(1, None)
    sink = marks[0][:, first] @ marks[1][:, first].T
    vertical = marks[0][:, others] @ marks[1][:, others].T
    return [
        content[0] @ content[1].T,
        sink,
        local[0] @ local[1].T,
        vertical,
        slash[0] @ slash[1].T,
        topic[0] @ topic[1].T,
    ]


def _turn(position: Tensor, speeds: Tensor) -> Tensor:
    """(n, 2 * planes) of length 1: cosines, then sines."""
    angles = (position.double()[:, None] * speeds) % (2 * math.pi)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float() / math.sqrt(len(speeds))
