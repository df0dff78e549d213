"""Conversations in random order against stock transformers: turns, answers, crops and forks lose and keep no token.

All far keys are retrieved, so that nothing but rounding may differ, in any forward pass.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from laws import examples
from tiny_models import MODELS, VOCABULARY, tiny_model
from torch import Tensor

import retrieval_attn as ra
from retrieval_attn.config import Sampling
from retrieval_attn.generate import Request
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kv.host_store import HostStore
from retrieval_attn.kv.shared_rows import SharedRows
from retrieval_attn.kv.window import Split, Window, split

# Largest relative error of the logits of one token. Measured over all examples of this file: 5e-5.
TOLERANCE = 5e-4

SLIDING_WINDOW = MODELS["gemma3"][2]["sliding_window"]


class Turn(NamedTuple):
    """Through a request, as sessions do it: new tokens, and a greedy answer (0: none)."""

    n_new: int
    n_answer: int


class Block(NamedTuple):
    """New tokens in one forward pass, without a request."""

    n_new: int


class Steps(NamedTuple):
    """Greedy tokens one by one, without a request."""

    n_new: int


class Build(NamedTuple):
    """Begin index builds, and do not wait for them."""


class Crop(NamedTuple):
    """Drop tokens; said as the length to keep, or as what goes."""

    n_dropped: int
    as_length: bool


class Fork(NamedTuple):
    """Go on with the fork or with its origin; the other side waits."""

    with_twin: bool


class Switch(NamedTuple):
    """Go on with the side that has waited longest."""


class Reorder(NamedTuple):
    """Let row i of the batch go on from what was row rows[i]."""

    rows: tuple[int, int]


Operation = Turn | Block | Steps | Build | Crop | Fork | Switch | Reorder


class Scenario(NamedTuple):
    """padding: of each row, on the left. room: tokens reserved for. few: rows that forks copy rather than share."""

    model: str
    options: dict[str, Any]
    on_disk: bool
    room: int
    few: int
    padding: tuple[int, ...]
    operations: list[Operation]


class Side:
    """One branch of a conversation: its cache, its tokens (B, n), and what the model made of those in the cache."""

    def __init__(self, kind: str, cache: ra.RetrievalCache, padding: tuple[int, ...]) -> None:
        self.kind, self.cache, self.padding = kind, cache, padding
        self.ids = torch.empty((len(padding), 0), dtype=torch.long)
        self.hidden = torch.empty((len(padding), 0, 64))
        self.drawn: list[int] = []  # positions whose token was chosen by the model

    @property
    def n_cached(self) -> int:
        return self.hidden.shape[1]

    def fork(self) -> "Side":
        twin = Side(self.kind, self.cache.fork(), self.padding)
        twin.ids, twin.hidden, twin.drawn = self.ids, self.hidden, list(self.drawn)
        return twin

    def inputs(self, start: int) -> dict[str, Tensor]:
        """What a model takes from token `start` on; a mask and positions only where there is padding."""
        ids = self.ids[:, start:]
        if not any(self.padding):
            return {"input_ids": ids}
        mask = torch.arange(self.ids.shape[1]) >= torch.tensor(self.padding)[:, None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}

    def turn(self, n_new: int, n_answer: int) -> None:
        self.add_tokens(n_new)
        ids = self.ids[0].tolist()
        request = Request(ours(self.kind), self.cache, Sampling(max_new_tokens=max(1, n_answer)), stop_ids=[])
        with self.recording():
            answer = list(request.tokens(ids)) if n_answer else request.read(ids) or []
        self.drawn += range(len(ids), len(ids) + len(answer))
        self.ids = torch.tensor([ids + answer])

    def block(self, n_new: int) -> None:
        self.add_tokens(n_new)
        self.run()

    def step(self) -> None:
        if self.n_cached and self.ids.shape[1] == self.n_cached:
            token = logits_of(self.kind, self.hidden[:, -1:]).argmax(-1)
            self.drawn.append(self.ids.shape[1])
            self.ids = torch.cat([self.ids, token], dim=1)
        self.block(0)

    def add_tokens(self, n: int) -> None:
        """n new tokens; one at least if all are in the cache."""
        n = max(n, self.n_cached + 1 - self.ids.shape[1])
        # Never the same token in the same place: a crop that keeps too much would go unnoticed.
        new = torch.randint(2, VOCABULARY, (len(self.padding), n))
        self.ids = torch.cat([self.ids, new], dim=1)

    def run(self) -> None:
        with self.recording(), torch.no_grad():
            ours(self.kind)(**self.inputs(self.n_cached), **cache_argument(self.cache))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the last hidden states of every forward pass inside."""
        passes: list[Tensor] = []
        hook = ours(self.kind).model.register_forward_hook(lambda *call: passes.append(call[-1].last_hidden_state))
        try:
            yield
        finally:
            hook.remove()
            self.hidden = torch.cat([self.hidden, *passes], dim=1)

    def crop(self, n_dropped: int, as_length: bool) -> None:
        self.check()
        keep = max(0, self.n_cached - n_dropped)
        tokens = keep if as_length and keep else keep - self.n_cached
        if self.kind == "gemma3" and keep < self.n_cached and self.n_cached >= SLIDING_WINDOW:
            with pytest.raises(ValueError, match=f"cannot go back to {keep} tokens; start a new cache and prefill"):
                self.cache.crop(tokens)
            return
        self.cache.crop(tokens)
        self.ids, self.hidden = self.ids[:, :keep], self.hidden[:, :keep]
        self.drawn = [position for position in self.drawn if position < keep]

    def reorder(self, rows: tuple[int, int]) -> None:
        self.check()
        self.cache.reorder_cache(torch.tensor(rows))
        self.ids, self.hidden = self.ids[list(rows)], self.hidden[list(rows)]
        self.padding = tuple(self.padding[row] for row in rows)

    def check(self) -> None:
        """Every pass gave the logits that one stock pass over the same tokens gives, and the same greedy tokens."""
        self.check_lengths()
        if not self.n_cached:
            return
        with torch.no_grad():
            stock = tiny("sdpa", self.kind)(**self.inputs(0)).logits
        mine = logits_of(self.kind, self.hidden)
        for row, padding in enumerate(self.padding):
            expected = stock[row, padding : self.n_cached]
            errors = (mine[row, padding:] - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert not errors.numel() or errors.max() < TOLERANCE
        for position in self.drawn:
            self.check_token(position, stock[:, position - 1])

    def check_token(self, position: int, stock: Tensor) -> None:
        """Stock logits (B, V) are largest for the tokens taken, but for ties within rounding."""
        for row, padding in enumerate(self.padding):
            taken = stock[row, self.ids[row, position]]
            assert position <= padding or stock[row].max() - taken < 1e-4 * stock[row].norm()

    def check_lengths(self) -> None:
        """Law 3: every part of every memory holds the same tokens."""
        for layer in self.cache.retrieval_layers:
            assert layer.get_seq_length() == self.n_cached
            for memory, padding in zip(layer.memories, self.padding, strict=bool(layer.memories)):
                n = max(0, self.n_cached - padding)
                assert (memory.length, memory.window.length, memory.sample.length) == (n, n, n)


@functools.cache
def tiny(attention: str, kind: str):
    ra.register()
    return tiny_model(kind, attention)


def ours(kind: str):
    return tiny("retrieval", kind)


def logits_of(kind: str, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return ours(kind).lm_head(hidden)


def play(scenario: Scenario) -> None:
    """Go through a conversation, and check every side of it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr("retrieval_attn.kv.shared_rows.FEW", scenario.few)
        patched.setattr("retrieval_attn.kv.address_space._DISK_STEP", 1 << 14)
        options = scenario.options | {"kv_dir": folder if scenario.on_disk else None}
        config = ra.RetrievalConfig(top_k=1 << 20, estimator="topk", exact_below=0, **options)
        cache = ra.RetrievalCache(ours(scenario.model).config, config)
        for layer in cache.retrieval_layers:
            layer._capacity = scenario.room
        sides = [Side(scenario.model, cache, scenario.padding)]
        for operation in scenario.operations:
            perform(operation, sides)
        for side in sides:
            side.step()
            side.check()


def perform(operation: Operation, sides: list[Side]) -> None:
    """On the first of the sides."""
    match operation:
        case Turn(n_new, n_answer):
            sides[0].turn(n_new, n_answer)
        case Block(n_new):
            sides[0].block(n_new)
        case Steps(n_new):
            for _ in range(n_new):
                sides[0].step()
        case Build():
            sides[0].cache.start_builds()
        case Crop(n_dropped, as_length):
            sides[0].crop(n_dropped, as_length)
        case Fork(with_twin):
            sides.insert(0 if with_twin else 1, sides[0].fork())
        case Switch():
            sides.append(sides.pop(0))
        case Reorder(rows):
            sides[0].reorder(rows)


def prompts(least: int = 1) -> st.SearchStrategy[int]:
    """Lengths of prompts. Most leave enough far keys for an index, which needs 128."""
    return st.integers(150, 400) | st.integers(least, 400)


OPTIONS = st.fixed_dictionaries(
    {
        "index": st.sampled_from(["exact", "scan", "graph", "page", "ivf", "auto"]),
        "followup": st.sampled_from(["exact", "retrieve"]),
        "n_sink": st.integers(0, 8) | st.integers(0, 130),
        "n_local": st.integers(1, 40) | st.integers(1, 150),
        "prefill_chunk": st.integers(1, 400).map(lambda n: 401 - n),
        "prefill_tile": st.integers(1, 400).map(lambda n: 401 - n),
    }
)

CROPS = st.builds(Crop, st.integers(0, 70) | st.integers(0, 400), st.booleans())

ANYWHERE = st.builds(Steps, st.integers(1, 20)) | CROPS | st.builds(Fork, st.booleans()) | st.builds(Switch)

BLOCKS = st.builds(Block, st.integers(1, 70))

TURNS = st.builds(Turn, st.integers(0, 70), st.integers(0, 12))


def scenarios(models: list[str], padding: st.SearchStrategy, first: st.SearchStrategy, rest: st.SearchStrategy):
    """Conversations that begin with `first` and go on with up to ten of `rest`."""
    operations = st.builds(lambda one, more: [one, *more], first, st.lists(rest, max_size=10))
    return st.builds(
        Scenario,
        st.sampled_from(models),
        OPTIONS,
        on_disk=st.booleans(),
        room=st.sampled_from([1 << 20, 32]),
        few=st.sampled_from([1 << 20, 0]),
        padding=padding,
        operations=operations,
    )


CONVERSATIONS = scenarios(
    ["llama", "llama", "gemma3"],
    st.just((0,)),
    st.builds(Turn, prompts(), st.integers(0, 12)) | st.builds(Block, prompts()),
    TURNS | BLOCKS | ANYWHERE | st.builds(Build),
)

BATCHES = scenarios(
    ["llama"],
    st.tuples(st.integers(0, 200), st.just(0)),
    st.builds(Block, prompts()),
    BLOCKS | ANYWHERE | st.builds(Reorder, st.tuples(st.integers(0, 1), st.integers(0, 1))),
)


@examples(30)
@given(CONVERSATIONS)
def test_any_conversation_equals_stock(scenario):
    """Laws 1, 3, 4 and 6, and forks and crops in any order."""
    play(scenario)


@examples(25)
@given(BATCHES)
def test_any_two_padded_rows_equal_stock(scenario):
    """Law 7 as well."""
    play(scenario)


@pytest.mark.parametrize(("n_dropped", "kept"), [(301, None), (350, None), (None, 301), (None, 350)])
def test_a_crop_beyond_what_there_is_does_no_harm(n_dropped, kept):
    """transformers itself empties the cache if more is dropped than it holds; refusing is as good."""
    side = Side("llama", ra.RetrievalCache(ours("llama").config, ra.RetrievalConfig()), (0,))
    side.block(300)
    with contextlib.suppress(ValueError):
        side.cache.crop(kept or -n_dropped)
    n = side.cache.get_seq_length()
    side.ids, side.hidden = side.ids[:, :n], side.hidden[:, :n]
    assert n in (0, 300)
    side.block(10)
    side.check()


def _shifted_split(length, n_sink, n_local):
    """The newest far token is in neither part."""
    sink_stop, far_stop, length = split(length, n_sink, n_local)
    return Split(sink_stop, max(sink_stop, far_stop - 1), length)


def _short_fork(self, length, fork=SharedRows.fork):
    """The twin has not the last row."""
    return fork(self, max(0, length - 1))


def _sharing_fork(self, fork=HostStore.fork):
    """The twin writes where its origin reads."""
    twin = fork(self)
    twin._keys = self._keys
    return twin


def _stale_crop(self, length, read):
    """The window keeps the tokens that were dropped."""
    self.length = min(self.length, length)


def _crop_but_one(self, length, read, crop=Window.crop):
    """One of the tokens that were dropped stays in the window."""
    if length < self.length:
        crop(self, length + 1, read)
        self.length = length


def _keep_index(self, far):
    """What was dropped is found again."""


# Whatever the profile: neither chance nor what an earlier run kept decides whether the fault is found.
EVERY_TIME_THE_SAME = settings(max_examples=500, phases=[Phase.generate], derandomize=True, database=None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("attention.layer_memory.split", _shifted_split),
        ("kv.shared_rows.SharedRows.fork", _short_fork),
        ("kv.host_store.HostStore.fork", _sharing_fork),
        ("kv.window.Window.crop", _stale_crop),
        ("kv.window.Window.crop", _crop_but_one),
        ("far.far_index.FarIndex.truncate", _keep_index),
    ],
)
def test_what_is_broken_is_found(monkeypatch, where, broken):
    """These tests can fail: within as many examples as `make test-long` tries, one token too many or too few shows."""
    monkeypatch.setattr(f"retrieval_attn.{where}", broken)
    find(CONVERSATIONS, _differs, settings=EVERY_TIME_THE_SAME)


def _differs(scenario):
    try:
        play(scenario)
    except (AssertionError, ValueError):
        return True
    return False
