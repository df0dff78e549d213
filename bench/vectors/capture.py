"""Runs a stock transformers model over a document and questions about it, and notes what its attention is given.

The model reads a document with facts in it, then questions, each with its true answer, each against the document alone.
An attention function of our own, registered for the time of the run, notes queries, keys and values after rotary
encoding and calls stock sdpa. Queries of the answers are the ones that decode steps ask; they are held out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrieval_attn.bench.shared.facts import Document, Fact, document
from retrieval_attn.bench.vectors.real import Capture, LayerVectors
from retrieval_attn.far.query_sample import QuerySample
from retrieval_attn.hf.attention import watched_attention
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import LLM, load

# What the runtime keeps near by default: those keys are in no index.
N_SINK, N_LOCAL = 128, 512

# Facts in a document, fewer in short ones. Every answer is two to five decode steps.
N_FACTS, TOKENS_PER_FACT = 100, 48

# Tokens left for a question and its answer.
_ROOM = 256


def capture(
    S: int,
    *,
    seed: int,
    model: str | None = None,
    text: str | None = None,
    n_prefill: int = 1024,
    n_heldout: int = 256,
    device: str = "auto",
    say: Callable[[str], None] = lambda what: None,
) -> Capture:
    """Let a model read a document of S far tokens (and those that stay near), and answer questions about it.

    model: as `load` takes it; None for the embedded one. text: what the document is made of, facts apart; None
    takes generated prose. n_prefill: queries spread over the document, kept as the runtime keeps them, so up to twice
    as many, and the last 256. n_heldout: queries of answers; fewer if the document has not so many facts in it.
    The document is read in one pass, because stock sdpa then needs no mask: activations of all tokens are in memory.
    Raises ValueError for an S that is too short for a fact or too long for the model.
    """
    llm = load(model, device=device)
    longest = llm.max_tokens - N_SINK - N_LOCAL - _ROOM
    if not 4 * TOKENS_PER_FACT <= S <= longest:
        raise ValueError(f"S must be between {4 * TOKENS_PER_FACT} and {longest} for a capture, got {S}")
    n_tokens = S + N_SINK + N_LOCAL
    say(f"writing a document of {n_tokens} tokens")
    script = _Script.written(llm, n_tokens, seed, text)
    recorder = _Recorder(llm.model.config.num_hidden_layers, n_prefill)
    with torch.inference_mode(), watched_attention(llm.model, recorder.attend):
        cache = DynamicCache(config=llm.model.config)
        say(f"reading {n_tokens} tokens")
        recorder.reading = True
        llm.model.base_model(input_ids=_row(script.document, llm), **cache_argument(cache), use_cache=True)
        recorder.reading = False
        answers = _answer_all(llm, cache, script, recorder, n_heldout, say)
        layers = recorder.layers(slice(N_SINK, n_tokens - N_LOCAL), len(answers.runs))
    about = {
        "model": "embedded" if model is None else Path(model).name,
        "tokens": n_tokens,
        "seed": seed,
        "text": "generated prose" if text is None else "a text file",
        "answered": answers.right_share,
    }
    runs, fact_at = torch.tensor(answers.runs), torch.tensor(answers.fact_at)
    return Capture(layers, recorder.asked_at(n_tokens), runs, fact_at, N_SINK, about)


class _Question(NamedTuple):
    """ids: from the end of the document to the end of the answer, of which the last n_answer are the answer and what
    ends it. fact_at: token of the document where the fact begins."""

    ids: list[int]
    n_answer: int
    fact_at: int


class _Script(NamedTuple):
    """What the model reads: the document, then each question against it."""

    document: list[int]
    questions: list[_Question]

    @classmethod
    def written(cls, llm: LLM, n_tokens: int, seed: int, text: str | None) -> "_Script":
        """A document of n_tokens tokens, and questions about what stands in its far part, in random order."""
        n_facts = min(N_FACTS, n_tokens // TOKENS_PER_FACT)
        # Documents come out within 1 % of the length asked for.
        doc = document(lambda x: len(llm.encode_text(x)), n_tokens + n_tokens // 100, n_facts, seed, text)
        return cls._of(llm, doc)._cut(n_tokens, np.random.default_rng([seed, 0xA5C]))

    @classmethod
    def _of(cls, llm: LLM, doc: Document) -> "_Script":
        head, _ = _rendered(llm, doc.text, doc.facts[0])
        encoded = llm.tokenizer(head, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        questions = []
        for fact in doc.facts:
            _, (asked, answer) = _rendered(llm, doc.text, fact)
            ids, n_asked = llm.encode_text(asked + answer), len(llm.encode_text(asked))
            fact_at = int(np.searchsorted(starts, head.index(fact.sentence)))
            questions.append(_Question(ids, len(ids) - n_asked, fact_at))
        return cls(list(encoded["input_ids"]), questions)

    def _cut(self, n_tokens: int, rng: np.random.Generator) -> "_Script":
        """The first n_tokens of the document, and the questions, shuffled, whose facts lie among its far tokens."""
        far = range(N_SINK, n_tokens - N_LOCAL - TOKENS_PER_FACT)
        kept = [question for question in self.questions if question.fact_at in far]
        if len(self.document) < n_tokens or not kept:
            raise ValueError(f"the text must give {n_tokens} tokens with a fact in it, got {len(self.document)} tokens")
        return _Script(self.document[:n_tokens], [kept[i] for i in rng.permutation(len(kept))])


def _rendered(llm: LLM, text: str, fact: Fact) -> tuple[str, tuple[str, str]]:
    """The prompt up to the end of the text; what follows it up to the answer; the answer, and what ends it."""
    if not getattr(llm.tokenizer, "chat_template", None):
        return text, (f"\n\n{fact.question}\n", fact.answer)
    # Rendered around a mark: a template costs time in proportion to what goes through it.
    mark = "\u2400"
    asked = [{"role": "user", "content": f"{mark}\n\n{fact.question}"}]
    prompt = llm.render(asked, add_generation_prompt=True)
    whole = llm.render([*asked, {"role": "assistant", "content": fact.answer}], add_generation_prompt=False)
    before, _, after = prompt.partition(mark)
    answer = whole[len(prompt) :] if whole.startswith(prompt) else fact.answer
    return before + text, (after, answer)


class _Recorder:
    """The attention function, and what it has been given."""

    def __init__(self, n_layers: int, n_prefill: int) -> None:
        self.reading = False
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.samples: dict[int, QuerySample] = {}
        self.answers: dict[int, list[Tensor]] = {}
        self._last = n_layers - 1
        self._n_prefill = n_prefill

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query (1, H, n, D), all keys and values (1, G, S, D)."""
        layer = module.layer_idx
        if self.reading:
            self.stored[layer] = key, value
            self.samples[layer] = QuerySample(self._n_prefill)
            self.samples[layer].add(query)
        else:
            self.answers.setdefault(layer, []).append(query[0].cpu())
        if self.reading and layer == self._last:
            # Nobody reads what the last layer makes of the document.
            return torch.zeros_like(query).transpose(1, 2), None
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None

    def keep_last(self, n: int) -> None:
        """Of the queries noted last, keep the last n."""
        for noted in self.answers.values():
            noted[-1] = noted[-1][:, -n:]

    def layers(self, far: slice, n_heldout: int) -> dict[int, LayerVectors]:
        """What each layer was given, in CPU memory: the far keys, and the first n_heldout queries of answers."""
        found = {}
        for i, (keys, values) in sorted(self.stored.items()):
            answers = torch.cat(self.answers[i], dim=1)[:, :n_heldout]
            found[i] = LayerVectors(
                keys[0, :, far].cpu(), values[0, :, far].cpu(), self.samples[i].queries().cpu(), answers
            )
        return found

    def asked_at(self, n_tokens: int) -> Tensor:
        """Tokens of the sampled queries, by sampling token numbers alike."""
        twin = QuerySample(self._n_prefill)
        twin.add(torch.arange(n_tokens, dtype=torch.float64)[None, None, :, None])
        return twin.queries().flatten().long()


class _Answers(NamedTuple):
    """Question of each held-out query; token where its fact begins; share of answer tokens the model got right."""

    runs: list[int]
    fact_at: list[int]
    right_share: float


def _answer_all(
    llm: LLM, cache: DynamicCache, script: _Script, recorder: _Recorder, n_heldout: int, say: Callable[[str], None]
) -> _Answers:
    """Ask, each time behind the document alone, until there are n_heldout queries or no more questions."""
    runs: list[int] = []
    fact_at: list[int] = []
    right: list[bool] = []
    for i, question in enumerate(script.questions):
        say(f"question {i + 1} of at most {len(script.questions)}")
        n = question.n_answer
        # The last token of an answer ends it and asks nothing; the token before the answer asks for its first.
        ids = _row(question.ids[:-1], llm)
        logits = llm.model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=n).logits
        right += [a == b for a, b in zip(logits[0].argmax(-1).tolist(), question.ids[-n:], strict=True)]
        recorder.keep_last(n)
        runs += [i] * n
        fact_at += [question.fact_at] * n
        cache.crop(len(script.document) - cache.get_seq_length())
        if len(runs) >= n_heldout:
            break
    return _Answers(runs[:n_heldout], fact_at[:n_heldout], sum(right) / len(right))


def _row(ids: list[int], llm: LLM) -> Tensor:
    return torch.tensor([ids], device=llm.model.device)
