"""One long text, read once, and how well each method foretells what follows; what other tasks on such a text share."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.ours import OurTalk
from retrieval_attn.bench.methods.stock import StockTalk
from retrieval_attn.bench.methods.talk import Read
from retrieval_attn.bench.shared.facts import prose
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.report import Row, short
from retrieval_attn.generate import Progress
from retrieval_attn.llm import LLM

SCORE_FIELDS = ("context", "method", "tokens", "ppl", "agreement", "kl", "status", "reason")
COST_FIELDS = ("tpot_ms", "visited_pct")

# Characters that a token of prose stands for: a first guess, and what no tokenizer exceeds.
_CHARS_PER_TOKEN, _MOST_CHARS_PER_TOKEN = 4, 64

# Rows of logits that are compared at a time, in float64.
_ROWS = 32

# Says what is being done, and which share of all work is done.
Tell = Callable[[str, float], None]


def text_ids(llm: LLM, text: str | None, n_tokens: int, seed: int) -> list[int]:
    """The first n_tokens token ids of a text, or all of them if it is shorter; None: of prose, which is never shorter.

    Begins with what the tokenizer puts before texts. For a model without one ids are random; ValueError for a text.
    """
    if llm.tokenizer is None:
        if text is not None:
            raise ValueError("a text needs a tokenizer, which the model has not; without --text, token ids are random")
        vocabulary = llm.model.get_input_embeddings().num_embeddings
        return [int(i) for i in np.random.default_rng([seed, 0x1D5]).integers(0, vocabulary, n_tokens)]
    n_chars = _CHARS_PER_TOKEN * n_tokens
    while True:
        ids = list(llm.tokenizer(text or prose(n_chars, seed), verbose=False)["input_ids"])
        if text is not None or len(ids) >= n_tokens:
            return ids[:n_tokens]
        if n_chars > _MOST_CHARS_PER_TOKEN * n_tokens:
            raise ValueError(f"the tokenizer makes only {len(ids)} tokens of {n_chars} characters of English prose")
        n_chars += n_chars // 2


def require_room(longest: int, more: int, n_text: int, llm: LLM) -> None:
    """Raise ValueError if the longest context and `more` tokens are longer than the text, or than the model takes."""
    for what, most in (("text", n_text), ("model's longest context", llm.max_tokens)):
        if longest + more > most:
            raise ValueError(
                f"a context of {longest} tokens and the {more} after it are longer than the {what}, {most} tokens; ask "
                "for a shorter --context"
            )


class Task(Protocol):
    """What is done with a text that was read up to some place."""

    def begin(self, read: Read) -> None:
        """What methods have in common, at each context. May fail as a method may."""

    def rows(self, method: Method) -> list[Row]:
        """What there is to say of a method at the context begun. Raises one of FAILURES where it cannot be measured."""

    def blank(self, context: int, method: str) -> list[Row]:
        """As many rows, unmeasured."""


def left_to_do(
    contexts: Sequence[int], methods: Sequence[Method], limit: int | None, done: Sequence[Row]
) -> dict[int, list[Method]]:
    """Methods by context, shortest first, without those of rows `done`; limit: so many pairs of the two at most."""
    known = {(row["context"], row["method"]) for row in done}
    pairs = [(context, method) for context in contexts for method in methods][:limit]
    left = sorted((pair for pair in pairs if (pair[0], pair[1].label) not in known), key=lambda pair: pair[0])
    return {context: [m for c, m in left if c == context] for context, _ in left}


def read_and_measure(
    bench: Bench, ids: list[int], left: dict[int, list[Method]], task: Task, tell: Tell
) -> Iterator[Row]:
    """Rows as they are made; those of a context and method come together, `last` in the last of them.

    ids: the text, of which every context is a beginning. It is read once, from context to context.
    """
    read: Read | None = None
    done, total = 0, sum(1 + len(methods) for methods in left.values())
    for context, methods in left.items():
        unread: Exception | None = None
        say = partial(_tell_progress, tell, f"{short(context)}: reading", done, total)
        try:
            read = bench.read(ids[:context], say, after=read)
            task.begin(read)
        except FAILURES as error:
            unread = error
        done += 1
        for method in methods:
            tell(f"{short(context)}: {method.label}", done / total)
            rows = _rows(task, context, method, unread)
            yield from ({**row, "last": row is rows[-1]} for row in rows)
            done += 1


def _tell_progress(tell: Tell, what: str, done: int, total: int, progress: Progress) -> None:
    tell(what, (done + progress.done / (progress.total or 1)) / total)


def _rows(task: Task, context: int, method: Method, unread: Exception | None) -> list[Row]:
    try:
        if unread is not None:
            raise unread
        return task.rows(method)
    except FAILURES as error:
        return [fail(row, error) for row in task.blank(context, method.label)]


class Foretelling:
    """The task of `bench ppl`: feed each method the tokens that follow, and see what it thought of each before it came.

    full: stock attention, which others are compared with; it is fed at every context, wanted or not.
    """

    def __init__(self, bench: Bench, ids: list[int], stretch: int, full: Method) -> None:
        self._bench, self._ids, self._stretch, self._full = bench, ids, stretch, full
        self._read: Read | None = None
        self._reference: _Fed | None = None
        self._missing = ""

    def begin(self, read: Read) -> None:
        """Feed full attention. Where that fails, methods are measured, but not compared."""
        self._read, self._reference, self._missing = read, None, ""
        try:
            self._reference = self._feed(self._full)
        except FAILURES as error:
            self._missing = f"no full attention to compare with: {error}"

    def rows(self, method: Method) -> list[Row]:
        """One row."""
        assert self._read is not None
        full, context = self._reference, len(self._read.ids)
        fed = full if full is not None and method.label == self._full.label else self._feed(method)
        # After each token fed, the model foretells the one behind it.
        wanted = self._ids[context + 1 :][: self._stretch]
        return [
            {
                **self.blank(context, method.label)[0],
                **judge(fed.logits, wanted, None if full is None else full.logits)._asdict(),
                "tokens": self._stretch,
                "tpot_ms": 1e3 * median(fed.seconds),
                "visited_pct": None if fed.visited is None else 100 * fed.visited,
                "status": "ok",
                "reason": self._missing,
            }
        ]

    def blank(self, context: int, method: str) -> list[Row]:
        """One row."""
        row = dict.fromkeys(SCORE_FIELDS + COST_FIELDS)
        return [{**row, "context": context, "method": method, "status": "failed", "reason": ""}]

    def _feed(self, method: Method) -> "_Fed":
        assert self._read is not None
        talk = self._bench.start(method, self._read.ids, self._read)
        assert isinstance(talk, OurTalk | StockTalk)
        return _Fed(*talk.feed(self._ids[len(self._read.ids) :][: self._stretch]))


class _Fed(NamedTuple):
    """What `feed` of a talk returns."""

    logits: Tensor
    seconds: list[float]
    visited: float | None


class Judged(NamedTuple):
    """Perplexity; the share of tokens whose likeliest one is full attention's, and the mean KL divergence from it in
    nats; None without it."""

    ppl: float
    agreement: float | None
    kl: float | None


def judge(logits: Tensor, wanted: Sequence[int], full: Tensor | None) -> Judged:
    """logits (n, V) before each of the n wanted tokens came, and those of full attention.

    Raises ValueError for logits that hold NaN, and for a token that was held impossible.
    """
    right = torch.tensor(wanted)
    logs = [rows.double().log_softmax(-1) for rows in logits.split(_ROWS)]
    loss = -torch.cat([log.gather(1, want[:, None]) for log, want in zip(logs, right.split(_ROWS), strict=True)]).mean()
    agreement = kl = None
    if full is not None:
        agreement = float((logits.argmax(-1) == full.argmax(-1)).float().mean())
        pairs = zip(full.split(_ROWS), logs, strict=True)
        kl = float(torch.cat([divergence(rows.double().log_softmax(-1), log) for rows, log in pairs]).mean())
    if not math.isfinite(loss.exp()) or not math.isfinite(kl or 0):
        raise ValueError("the perplexity is not finite: the logits hold NaN, or leave a token no chance")
    # Below zero it is rounding.
    return Judged(float(loss.exp()), agreement, None if kl is None else max(0.0, kl))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of rows of log-probabilities (n, V); what p holds impossible adds nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
