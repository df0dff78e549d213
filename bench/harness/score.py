"""How likely a text is after another, and answers that end at stop strings: what evaluation harnesses ask a model for.

Every request is answered as if it were the only one. Nothing here knows a harness; `command.py` brings them together.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrieval_attn.config import Sampling
from retrieval_attn.generate import Request, chunk_ends
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import LLM

log = logging.getLogger("retrieval_attn")

# So often along a continuation it is asked whether the index has been outgrown. It depends on the length alone, so that
# equal requests meet equal indexes.
LOOK_EVERY = 1024

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ANSWER_OPTIONS = (*LENGTH_NAMES, "until", "do_sample", "temperature", "top_p", "top_k", "seed", "num_beams")


class Pair(NamedTuple):
    """Tokens that are given, and tokens to score after them; at least one of each."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """log_prob: natural log of the continuation's probability. greedy: each of its tokens was the likeliest."""

    log_prob: float
    greedy: bool


class AnswerOptions(NamedTuple):
    """Where an answer ends, and how its tokens are chosen."""

    until: list[str]
    sampling: Sampling


class Scorer:
    """Scores and answers of one model. Not for use from two threads at once."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # Of all steps so far: far keys there were, and those that were looked at.
        self.far, self.visited = 0.0, 0.0

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text when nothing else does: BOS, or EOS if the tokenizer has no BOS."""
        tokenizer = self.llm.tokenizer
        found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if found is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin an empty context with")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens, unless the text begins with BOS (or EOS) written out."""
        tokenizer = self.llm.tokenizer
        begin = tokenizer.bos_token or tokenizer.eos_token
        if begin and text.startswith(begin):
            return self.llm.encode_text(text)
        return list(tokenizer(text, verbose=False)["input_ids"])

    def pair(self, context: str, continuation: str) -> Pair:
        """Tokens of both, encoded as one text and parted where the context's own tokens end.

        Blanks at the end of the context go to the continuation, because tokens begin with blanks. An empty context is
        `prefix_id`, or the continuation's first token if that is the same. Raises ValueError if nothing is left to
        score.
        """
        stem = context.rstrip()
        told = context[len(stem) :] + continuation
        if stem:
            given, whole = self.encode(stem), self.encode(stem + told)
            pair = Pair(given, whole[len(given) :])
        else:
            whole = self.llm.encode_text(told)
            n_given = int(whole[:1] == [self.prefix_id])
            pair = Pair([self.prefix_id], whole[n_given:])
        if not pair.continuation:
            raise ValueError(f"a continuation must have at least one token after its context, got {continuation!r}")
        return pair

    def windows(self, text: str) -> list[Pair]:
        """Pairs that together score each token of a text once, each window as long as the model allows.

        The first token comes after `prefix_id`; every later window begins with one token that is scored before, the
        last one with as many as there is room for.
        """
        ids, most = self.encode(text), self.llm.max_tokens
        whole = [self.prefix_id, *ids]
        ends = [*range(0, len(ids), most), len(ids)] if ids else []
        return [Pair(whole[max(0, stop - most) : start + 1], ids[start:stop]) for start, stop in pairwise(ends)]

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Yield the number of each pair and its score, those of equal contexts together.

        A context is read once for all its continuations, as a prompt is, except for its last token: from there on
        every token is a step that retrieves, so that each score rests on retrieval, those of single tokens included.
        A context that is too long loses its first tokens, with a warning, as in the harness's own models.

        Raises ValueError for a continuation longer than the model's maximum, MemoryError if the machine lacks the
        memory for the longest pair; both before any work.
        """
        fitted = [self._fitted(pair) for pair in pairs]
        if fitted:
            self.llm.plan(max(len(pair.context) + len(pair.continuation) for pair in fitted)).check()
        together: dict[tuple[int, ...], list[int]] = {}
        for i, pair in enumerate(fitted):
            together.setdefault(tuple(pair.context), []).append(i)
        for context, members in together.items():
            cache, first = self._read(list(context))
            for i in members:
                yield i, self._score(cache, first, fitted[i].continuation)
            self._note(cache)

    def _fitted(self, pair: Pair) -> Pair:
        """The last token of a continuation is scored but never run, so that it needs no room."""
        most, n = self.llm.max_tokens, len(pair.continuation)
        if n > most:
            raise ValueError(f"a continuation must have at most {most} tokens (the model's maximum), got {n}")
        return Pair(_last(pair.context, most + 1 - n), pair.continuation)

    def _read(self, context: list[int]) -> tuple[RetrievalCache, Tensor]:
        """A cache that holds the context, and the log probabilities (V,) of the token after it."""
        cache, done, body = self.llm.new_cache(), 0, context[:-1]
        with cache.working(), cache.exact():
            for stop in chunk_ends(len(body), cache.config):
                part = torch.tensor([body[done:stop]], device=self.llm.model.device)
                self.llm.model.base_model(input_ids=part, **cache_argument(cache), use_cache=True)
                done = stop
        cache.start_builds()
        return cache, self._step(cache, context[-1])

    def _score(self, cache: RetrievalCache, first: Tensor, continuation: list[int]) -> Score:
        """Along a fork, so that the cache stays as it was for the next continuation."""
        own = cache.fork() if len(continuation) > 1 else None
        total, greedy, log_probs = 0.0, True, first
        for i, token in enumerate(continuation):
            if own is not None and i > 0:
                log_probs = self._step(own, continuation[i - 1])
            total += float(log_probs[token])
            greedy = greedy and int(log_probs.argmax()) == token
        if own is not None:
            self._note(own)
        return Score(total, greedy)

    def _step(self, cache: RetrievalCache, token: int) -> Tensor:
        if cache.get_seq_length() % LOOK_EVERY == 0:
            cache.start_builds()
        ids = torch.tensor([[token]], device=self.llm.model.device)
        with cache.working():
            out = self.llm.model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1].float()
        if torch.isnan(logits).any():
            raise ValueError("the model's logits hold NaN; check its weights and dtype (try dtype='float32')")
        return logits.log_softmax(-1)

    def answer(self, context: str, options: AnswerOptions) -> str:
        """The answer to a context, as `LLM.generate` gives it, up to the first stop string.

        A context that leaves no room for `max_new_tokens` loses its first tokens, with a warning. Raises ValueError if
        the answer alone fills the model's maximum, MemoryError (before any work) if the machine lacks the memory.
        """
        until, sampling = options
        room = self.llm.max_tokens - sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"an answer must be shorter than {self.llm.max_tokens} tokens (the model's maximum), got "
                f"max_new_tokens={sampling.max_new_tokens}"
            )
        ids = _last(self.encode(context) or [self.prefix_id], room)
        self.llm.plan(len(ids) + sampling.max_new_tokens).check()
        stops = [*until, self.llm.tokenizer.eos_token or ""]
        return cut(self.llm.decode(self._answer(ids, sampling, stops)), stops)

    def _answer(self, ids: list[int], sampling: Sampling, stops: list[str]) -> list[int]:
        """Tokens up to and including those that complete a stop string."""
        cache = self.llm.new_cache()
        request, answer = Request(self.llm.model, cache, sampling, self.llm.stop_ids()), list[int]()
        with closing(request.tokens(ids)) as tokens:
            for token in tokens:
                answer.append(token)
                if self._is_stopped(answer, stops):
                    break
        cache.cancel_builds()
        self._note(cache)
        return answer

    def _is_stopped(self, answer: list[int], stops: list[str]) -> bool:
        """Whether the end of an answer holds a stop string, special tokens written out."""
        # No token is less than a byte, and the first few may be parts of one character.
        n_last = max(len(stop.encode()) for stop in stops) + 4
        end = self.llm.tokenizer.decode(answer[-n_last:], skip_special_tokens=False)
        return any(stop in end for stop in stops if stop)

    def _note(self, cache: RetrievalCache) -> None:
        clocks = [layer.clock for layer in cache.retrieval_layers]
        self.far += sum(clock.far for clock in clocks)
        self.visited += sum(clock.visited for clock in clocks)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any stop string; empty ones stop nothing.

    >>> cut("one. two, three", [",", ". ", ""])
    'one'
    """
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def _last(ids: list[int], n: int) -> list[int]:
    """The last n ids, with a warning if that is not all of them."""
    if len(ids) > n:
        log.warning("a context of %d tokens is too long; its first %d are left out", len(ids), len(ids) - n)
    return ids[-n:]


def answer_options(given: dict[str, Any], max_new_tokens: int, seed: int = 0) -> AnswerOptions:
    """What a harness's `gen_kwargs` ask for; `top_k` among them is that of sampling.

    max_new_tokens: if they say nothing about it. do_sample: False is greedy whatever the temperature; True without a
    temperature draws at 1, as in transformers; left out, the temperature decides. Raises ValueError for options that
    are unknown, or out of range.
    """
    unknown = sorted(set(given) - set(ANSWER_OPTIONS))
    if unknown:
        raise ValueError(f"unknown generation option {unknown[0]!r}; the options are {', '.join(ANSWER_OPTIONS)}")
    if given.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams must be 1 (beams are not searched), got {given['num_beams']!r}")
    until = given.get("until") or []
    lengths = [given[name] for name in LENGTH_NAMES if given.get(name) is not None]
    drawn = {name: given[name] for name in ("top_p", "top_k", "seed") if given.get(name) is not None}
    sampling = Sampling(
        max_new_tokens=int([*lengths, max_new_tokens][0]),
        temperature=_temperature(given.get("do_sample"), given.get("temperature")),
        **({"seed": seed} | drawn),
    )
    return AnswerOptions([until] if isinstance(until, str) else list(until), sampling)


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    if do_sample is False:
        return 0.0
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return float(temperature)
