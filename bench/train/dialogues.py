"""Training documents with facts in them and turns about those, straight as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retrieval_attn.bench.shared import facts as texts
from retrieval_attn.bench.train.prose import Pool
from retrieval_attn.bench.train.tokenizer import ASSISTANT, END, FIRST_TRAINING_SEED, SPECIALS, SYSTEM, USER


class Dialogue(NamedTuple):
    """Token ids; for each the number (from 1) of the answer it belongs to, or 0; and whether it is mere filler."""

    ids: np.ndarray
    answer: np.ndarray
    filler: np.ndarray


@dataclass
class Writer:
    """Makes training documents and dialogues straight as tokens."""

    tokenizer: PreTrainedTokenizerFast
    pools: list[Pool]
    rng: np.random.Generator

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.backend_tokenizer.encode(text).ids, dtype=np.int32)

    def facts(self, n: int) -> list[texts.Fact]:
        """Facts as in the benchmarks; one in twenty about an entity of arbitrary tokens, so that any name will do."""
        made = texts.make_facts(n, int(self.rng.integers(FIRST_TRAINING_SEED, 2**31)))
        return [self._wild(fact) if self.rng.random() < 1 / 20 else fact for fact in made]

    def _wild(self, fact: texts.Fact) -> texts.Fact:
        ids = self.rng.integers(len(SPECIALS) + 256, len(self.tokenizer), int(self.rng.integers(2, 5)))
        name = self.tokenizer.decode(ids).strip()
        if not name or name[-1] in ".?!:,":
            return fact
        return texts.Fact(
            name,
            fact.attribute,
            fact.value,
            fact.sentence.replace(fact.entity, name),
            fact.question.replace(fact.entity, name),
        )

    def filler(self, n_tokens: int) -> list[np.ndarray]:
        """Sentences from one pool, or runs from both in turn."""
        if self.rng.random() < 0.7:
            return self.pools[int(self.rng.integers(len(self.pools)))].run(self.rng, n_tokens)
        out: list[np.ndarray] = []
        while (missing := n_tokens - sum(map(len, out))) > 0:
            length = min(missing, int(self.rng.integers(200, 4000)))
            out += self.pools[int(self.rng.integers(len(self.pools)))].run(self.rng, length)
        return out

    def document(self, n_tokens: int, facts: Sequence[texts.Fact]) -> Dialogue:
        """The opening of a dialogue, at most n_tokens: user tag, filler with the facts planted anywhere."""
        planted = [self.encode(" " + fact.sentence) for fact in facts]
        room = n_tokens - sum(map(len, planted)) - 1
        pieces = self.filler(room) if room > 0 else []
        while pieces and sum(map(len, pieces)) > room:
            pieces.pop()
        for place, fact in zip(sorted(self.rng.integers(0, len(pieces) + 1, len(planted)))[::-1], planted, strict=True):
            pieces.insert(int(place), fact)
        ids = np.concatenate([self.encode(USER), *pieces])
        secret = {id(fact) for fact in planted}
        filler = np.repeat(
            [False] + [id(piece) not in secret for piece in pieces], [1] + [len(piece) for piece in pieces]
        )
        return Dialogue(ids, np.zeros(len(ids), dtype=np.int64), filler)

    def turn(self, fact: texts.Fact, first: bool) -> Dialogue:
        """A question and its answer, as the chat template writes them; the first ends the document's message."""
        asked = self.encode(("\n\n" if first else USER) + fact.question + END + ASSISTANT)
        answer = self.encode(" " + fact.answer + END)
        ids = np.concatenate([asked, answer])
        return Dialogue(ids, np.repeat([0, 1], [len(asked), len(answer)]), np.zeros(len(ids), dtype=bool))

    def turns(self, facts: Sequence[texts.Fact], n_tokens: int) -> Dialogue:
        """Turns one after another, as many as fit into n_tokens; at least one."""
        ids, answer, total = [], [], 0
        for i, fact in enumerate(facts):
            turn = self.turn(fact, first=i == 0)
            total += len(turn.ids)
            if i and total > n_tokens:
                break
            ids.append(turn.ids)
            answer.append(turn.answer * (i + 1))
        return Dialogue(np.concatenate(ids), np.concatenate(answer), np.zeros(sum(map(len, ids)), dtype=bool))

    def dialogue(self, n_tokens: int) -> Dialogue:
        """Exactly n_tokens: sometimes a system message, a document with facts, turns about some of them."""
        most = min(400, max(3, n_tokens // 40))
        n_facts = int(self.rng.integers(max(2, most // int(self.rng.choice([2, 2, 8]))), most + 1))
        facts = self.facts(n_facts)
        asked = [facts[i] for i in self.rng.permutation(n_facts)]
        turns = self.turns(asked, min(n_tokens * 9 // 20, 2000))
        head = self.encode(SYSTEM + "Answer from the text." + END) if self.rng.random() < 0.1 else self.encode("")
        while True:
            room = n_tokens - len(turns.ids) - len(head)
            body = self.document(room, facts)
            if len(body.ids) <= room:
                break
            facts = [fact for fact in facts if fact is not next(f for f in reversed(facts) if f not in asked[:1])]
            kept = [fact for fact in asked if fact in facts]
            turns = self.turns(kept, len(turns.ids) - 1)
        # The last filler sentence did not fit: fill up with the start of another one.
        missing = room - len(body.ids)
        pad = np.resize(self.filler(missing)[0], missing) if missing else self.encode("")
        body = Dialogue(
            *(np.concatenate([x[:1], np.full(missing, y), x[1:]]) for x, y in zip(body, (0, 0, True), strict=True))
        )
        body.ids[1 : 1 + missing] = pad
        opening = Dialogue(head, np.zeros(len(head), dtype=np.int64), np.zeros(len(head), dtype=bool))
        return Dialogue(*(np.concatenate(parts) for parts in zip(opening, body, turns, strict=True)))

    def repeats(self, n_tokens: int) -> Dialogue:
        """Random tokens, repeated with a random period; every repeated token counts as an answer."""
        period = int(self.rng.integers(4, 22))
        ids = np.resize(self.rng.integers(len(SPECIALS), len(self.tokenizer), period), n_tokens)
        answer = np.where(np.arange(n_tokens) < period + 1, 0, np.arange(n_tokens))
        return Dialogue(ids, answer, np.zeros(n_tokens, dtype=bool))


class Batch(NamedTuple):
    """ids, answer and filler (B, T) of `Dialogue`s, shorter rows ending in padding."""

    ids: Tensor
    answer: Tensor
    filler: Tensor


def stack(dialogues: Sequence[Dialogue], device: str) -> Batch:
    """Rows as long as the longest."""
    width = max(len(d.ids) for d in dialogues)
    columns = ([np.pad(part, (0, width - len(part))) for part in parts] for parts in zip(*dialogues, strict=True))
    ids, answer, filler = (torch.from_numpy(np.stack(rows)).to(device) for rows in columns)
    return Batch(ids.long(), answer.long(), filler)
