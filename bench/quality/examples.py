"""What a quality benchmark asks of a model: a context, turns about it, and the token ids that they become.

Generators make `Example`s, `Prompts` turns them into ids, runners collect answers, and scoring.py judges them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.llm import LLM
from retrieval_attn.session import turn_frame

# Between an answer and the next question, where no chat template says what stands there.
BETWEEN_TURNS = "\n\n"

# Of the tokens asked for, what a prompt may fall short.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Turn:
    """One question about a context.

    ask: the user's words. refs: what an answer is held against.
    scorer: a name in `scoring.SCORERS`. max_new_tokens: room for the answer. prefix: words put into the answer's mouth,
    which are not part of it. golden: the answer that later turns see in the history. depth: where in the context the
    answer stands, from 0 (its start) to 1; None if that makes no sense. part: the half of a mixed task it belongs to.
    """

    ask: str
    refs: tuple[str, ...]
    scorer: str
    max_new_tokens: int
    prefix: str = ""
    golden: str = ""
    depth: float | None = None
    part: str = ""


@dataclass(frozen=True)
class Example:
    """A context, and turns about it. id is unique within a task and length. joint: what stands between the context and
    the first question."""

    task: str
    id: str
    context: str
    turns: tuple[Turn, ...]
    joint: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # what a generator knows of its example, for its tests


class _Frame(NamedTuple):
    """The text around a user's words, and what comes between the call for an answer and the answer."""

    before: str
    after: str
    lead: str


class Prompts:
    """Examples as token ids of one model, through its chat template if it has one.

    A context is encoded apart from what follows it, so that all that follows shares its ids, and its keys and values.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._first, self._next = (self._frame(first) for first in (True, False))

    def _frame(self, first: bool) -> _Frame:
        if not getattr(self._llm.tokenizer, "chat_template", None):
            return _Frame("" if first else BETWEEN_TURNS, "", "")
        around = turn_frame(self._llm, None, first)
        return _Frame(around.before, around.after, around.lead)

    def context(self, example: Example) -> list[int]:
        """What is read before any question."""
        return self._encode(self._first.before + example.context, begins=True)

    def request(self, context: Sequence[int], example: Example, number: int) -> list[int]:
        """A turn right after the ids of the context, as if no other had been asked."""
        return [*context, *self._first_turn(example, number)]

    def follow_up(self, so_far: Sequence[int], example: Example, number: int) -> list[int]:
        """A turn after the one before it, whose ids are given and whose golden answer then stands in the history."""
        turn = example.turns[number]
        golden = self._next.lead + example.turns[number - 1].golden + self._next.before
        return [*so_far, *self._encode(golden + turn.ask + self._next.after + turn.prefix)]

    def _first_turn(self, example: Example, number: int) -> list[int]:
        turn = example.turns[number]
        return self._encode(example.joint + turn.ask + self._first.after + turn.prefix)

    def _encode(self, text: str, begins: bool = False) -> list[int]:
        # Without a template the tokenizer adds what texts begin with, once.
        if begins and not self._first.before:
            return list(self._llm.tokenizer(text, verbose=False)["input_ids"])
        return self._llm.encode_text(text)

    def count(self, example: Example) -> int:
        """Tokens of the context and its first turn."""
        return len(self.context(example)) + len(self._first_turn(example, 0))

    def room(self, example: Example) -> int:
        """Tokens that its turns may add to its context, at most: questions, golden answers and the last answer."""
        before, after, lead = self._next
        turns = [f"{before}{turn.ask}{after}{turn.prefix}{lead}{turn.golden}" for turn in example.turns]
        return sum(len(self._encode(turn)) for turn in turns) + max(turn.max_new_tokens for turn in example.turns)


def fit(make: Callable[[int], Example], n_tokens: int, prompts: Prompts, longest: int) -> Example:
    """The example of the largest size whose prompt (context and first turn) has at most n_tokens tokens.

    make: an example of a given size, in units of its haystack (lines, words, pairs) of at least a token each;
    deterministic, longer for larger sizes until its text ends. longest: tokens that the model takes, answers included.
    Prompts are within 1 % of n_tokens, or within one unit where a unit is more than that; but where the model takes no
    more than n_tokens, its turns and answers are among them. Raises ValueError if the model is too short, or n_tokens
    is, or the text.
    """
    example, most, room = make(1), 0, 0
    # Small examples have fewer turns: what is found may need more room than was left for it.
    while (needed := prompts.room(example)) > room:
        room = needed
        if n_tokens * (1 - TOLERANCE) > longest or room >= longest:
            raise ValueError(
                f"a context of {n_tokens} tokens and {room} more for the turns of {example.task} are longer than the "
                f"model's {longest}; ask for fewer"
            )
        # Turns come on top of the context, unless the model has no room for them: then they are within, as in RULER.
        sought, most = most, min(n_tokens, longest - room)
        if most != sought:
            example = _largest(make, most, prompts)
    return example


def _largest(make: Callable[[int], Example], most: int, prompts: Prompts) -> Example:
    """Secant steps towards `most` tokens between a size known to fit and one known not to."""
    best, low, high, slope = make(1), 1, None, 8.0
    if (low_tokens := prompts.count(best)) > most:
        raise ValueError(f"{best.task} needs at least {low_tokens} tokens, got {most}; ask for a longer context")
    while high is None or high - low > 1:
        step = max(1, int((most - low_tokens) / slope))
        size = low + step if high is None else min(low + step, high - 1)
        example = make(size)
        tokens = prompts.count(example)
        # Where nothing was added, counts are rounded or the text has ended: look further on.
        slope = (tokens - low_tokens) / (size - low) if tokens > low_tokens else slope / 2
        if tokens > most:
            high = size
            continue
        best, low, low_tokens = example, size, tokens
        # A unit more would be more than is missing: good enough, though a shorter one might still fit.
        if most - tokens < slope or size > most:
            break
    if low > most and most - low_tokens > TOLERANCE * most:
        raise ValueError(f"{best.task} has text for {low_tokens} tokens only, got {most}; ask for a shorter context")
    return best


def rng_of(*words: int | str) -> np.random.Generator:
    """A generator for these numbers and names: the same on every machine, independent for different ones."""
    seeds = [word if isinstance(word, int) else int.from_bytes(word.encode()) for word in words]
    # Zeros at the end make no difference to NumPy.
    return np.random.default_rng([*seeds, len(words)])
