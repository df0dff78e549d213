"""Training dialogues in the forms that RULER, SCBench and needle tests ask in, for the embedded model.

The sentences and questions are those of the tasks of ruler, scbench and needle; what is asked is
drawn anew. A document holds many answers and is asked for several, so that every token read teaches much.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retrieval_attn.bench.needle import tasks as needle_tasks
from retrieval_attn.bench.ruler import tasks as ruler_tasks
from retrieval_attn.bench.ruler.tasks import NIAH, NOISE, Names, ask_for
from retrieval_attn.bench.scbench import tasks as scbench_tasks
from retrieval_attn.bench.shared.facts import ADJECTIVES, CITIES
from retrieval_attn.bench.train.dialogues import Dialogue, Writer
from retrieval_attn.bench.train.tokenizer import ASSISTANT, END, USER

# Tokens of turns behind a document, at most.
MOST_TURNS = 1200


class Piece(NamedTuple):
    """Text of a document, beginning with the white space before it; and what can be asked of it, or None."""

    text: str
    asked: "Asked | None" = None


class Asked(NamedTuple):
    """A question, words put into the answer's mouth, and the answer with the white space before it."""

    question: str
    prefix: str
    answer: str


class Text(NamedTuple):
    """A document: what stands before the pieces, the pieces in order, and what stands before the first question."""

    begin: str
    pieces: list[Piece]
    joint: str = ""
    close: str = ""


@dataclass
class Forms:
    """Writes documents of all forms."""

    writer: Writer

    def dialogue(self, n_tokens: int) -> Dialogue:
        """About n_tokens: a document of a random form and turns about it."""
        rng = self.writer.rng
        form = FORMS[int(rng.integers(len(FORMS)))]
        return self._written(form(self, n_tokens), n_tokens)

    def _written(self, text: Text, n_tokens: int) -> Dialogue:
        rng, encode = self.writer.rng, self.writer.encode
        able = [i for i, piece in enumerate(text.pieces) if piece.asked is not None]
        chosen, turns, total = set[int](), list[Dialogue](), 0
        for i in rng.permutation(able):
            asked = text.pieces[i].asked
            assert asked is not None
            turn = self._turn(asked, text.joint if not turns else "", first=not turns, number=len(turns) + 1)
            if turns and total + len(turn.ids) > min(MOST_TURNS, n_tokens // 3):
                break
            chosen.add(int(i))
            turns.append(turn)
            total += len(turn.ids)
        parts = [(encode(USER + text.begin), False)]
        parts += [(encode(piece.text), i not in chosen) for i, piece in enumerate(text.pieces)]
        parts.append((encode(text.close), False))
        body = Dialogue(
            np.concatenate([ids for ids, _ in parts]),
            np.zeros(sum(len(ids) for ids, _ in parts), dtype=np.int64),
            np.repeat([filler for _, filler in parts], [len(ids) for ids, _ in parts]),
        )
        return Dialogue(*(np.concatenate(columns) for columns in zip(body, *turns, strict=True)))

    def _turn(self, asked: Asked, joint: str, first: bool, number: int) -> Dialogue:
        words = (joint if first else USER) + asked.question + END + ASSISTANT + asked.prefix
        question, answer = self.writer.encode(words), self.writer.encode(asked.answer + END)
        ids = np.concatenate([question, answer])
        return Dialogue(ids, np.repeat([0, number], [len(question), len(answer)]), np.zeros(len(ids), dtype=bool))

    def _prose(self, n_tokens: int) -> list[str]:
        """Sentences, each with the white space before it."""
        decode = self.writer.tokenizer.decode
        return [decode(ids) for ids in self.writer.filler(max(1, n_tokens))]

    def _mixed(self, straw: Sequence[str], needles: Sequence[Piece]) -> list[Piece]:
        pieces = [Piece(text) for text in straw]
        for needle in needles:
            pieces.insert(int(self.writer.rng.integers(len(pieces) + 1)), needle)
        return pieces

    def niah(self, n_tokens: int) -> Text:
        """One of RULER's eight, with as many needles as there is room for, or few."""
        rng = self.writer.rng
        kind = list(NIAH.values())[int(rng.integers(len(NIAH)))]
        names, n_asked = Names(rng), kind.n_values * kind.n_queries
        cost = 70 if "uuids" in (kind.keys, kind.values) else 32
        most = n_tokens // cost
        n = most if kind.haystack == "needle" else int(rng.integers(1, 1 + min(40, most)))
        n_keys = max(1, n // kind.n_values)
        keys = [names.draw(kind.keys) for _ in range(n_keys)]
        values = [[names.draw(kind.values) for _ in range(kind.n_values)] for _ in keys]
        gap = " " if kind.haystack == "essay" else "\n"
        line = ruler_tasks.NEEDLE
        texts = [
            [gap + line.format(kind=kind.values, key=key, value=value) for value in own]
            for key, own in zip(keys, values, strict=True)
        ]
        begin, _, _ = ask_for(kind.values, keys, n_asked)
        needles = [Piece(text) for own in texts for text in own]
        order = rng.permutation(len(needles))
        place = {int(i): position for position, i in enumerate(order)}
        shuffled = [needles[i] for i in order]
        for i in range(n_keys):
            group = [i] if kind.n_queries == 1 else [(i + j) % n_keys for j in range(min(kind.n_queries, n_keys))]
            flat = [g * kind.n_values + v for g in group for v in range(kind.n_values)]
            # Of one key with several values, they are told in the order of the text.
            told = sorted(flat, key=place.__getitem__) if kind.n_queries == 1 else flat
            answer = ", ".join(values[f // kind.n_values][f % kind.n_values] for f in told)
            _, question, prefix = ask_for(kind.values, [keys[g] for g in group], n_asked)
            at = place[flat[0]]
            shuffled[at] = shuffled[at]._replace(asked=Asked(question, prefix, f" {answer}"))
        room = n_tokens - len(needles) * cost
        if kind.haystack == "noise":
            return Text(begin.rstrip("\n"), self._mixed(["\n" + NOISE] * max(0, room // 24), shuffled))
        if kind.haystack == "essay":
            return Text(begin.rstrip("\n") + "\n", self._mixed(self._prose(room), shuffled))
        return Text(begin.rstrip("\n"), shuffled)

    def pairs(self, n_tokens: int) -> Text:
        """Retr.KV: short keys and values, or UUIDs; as one object, or as lines among prose."""
        rng = self.writer.rng
        names, short, mixed = Names(rng), rng.random() < 0.9, rng.random() < 0.15
        kinds, cost = (("words", "numbers"), 20) if short else (("uuids", "uuids"), 62)
        n = max(1, n_tokens // ((3 if mixed else 1) * cost))
        named = [(names.draw(kinds[0]), names.draw(kinds[1])) for _ in range(n)]
        # A number without a blank before it is another token than one with: copied as it stands, it is copied sooner.
        asked = [Asked(scbench_tasks.KV_ASK.format(key=key), "", value) for key, value in named]
        begin, joint = scbench_tasks.KV_BEGIN, scbench_tasks.BLANK_LINE
        if mixed:
            lines = [Piece(" " + json.dumps({k: v}), a) for (k, v), a in zip(named, asked, strict=True)]
            return Text(begin, self._mixed(self._prose(n_tokens - cost * n), lines), joint)
        pieces = [Piece(f' "{k}": "{v}",', a) for (k, v), a in zip(named, asked, strict=True)]
        pieces[0] = pieces[0]._replace(text="{" + pieces[0].text.lstrip())
        pieces[-1] = pieces[-1]._replace(text=pieces[-1].text.rstrip(",") + "}")
        return Text(begin + "JSON data:\n", pieces, joint)

    def cities(self, n_tokens: int) -> Text:
        """The needle test in MInference's words."""
        rng = self.writer.rng
        chosen = [CITIES[i] for i in rng.permutation(len(CITIES))[: int(rng.integers(1, 30))]]
        names = Names(rng)
        needles = []
        for city in chosen[: max(1, n_tokens // 60)]:
            number = names.draw("numbers")
            asked = Asked(needle_tasks.ASK.format(city=city).lstrip("\n"), "", f" {number}")
            needles.append(Piece(f"\n{needle_tasks.NEEDLE.format(city=city, number=number)}\n", asked))
        room = n_tokens - 20 * len(needles)
        return Text(needle_tasks.BEGIN, self._mixed(self._prose(room), needles), scbench_tasks.BLANK_LINE)

    def pass_keys(self, n_tokens: int) -> Text:
        """The needles of Mix.Sum+NIAH."""
        rng = self.writer.rng
        names = Names(rng)
        needles = []
        for i in rng.permutation(len(ADJECTIVES))[: int(rng.integers(1, 20))]:
            name, key = ADJECTIVES[i], names.draw("numbers")[:5]
            asked = Asked(scbench_tasks.PASSKEY_ASK.format(name=name), "", f" {key}")
            needles.append(Piece(" " + scbench_tasks.PASSKEY.format(name=name, key=key), asked))
        room = n_tokens - 24 * len(needles)
        begin, joint = scbench_tasks.PASSKEY_BEGIN, scbench_tasks.BLANK_LINE
        return Text(begin, self._mixed(self._prose(room), needles), joint)


FORMS: tuple[Callable[[Forms, int], Text], ...] = (
    Forms.niah,
    Forms.niah,
    Forms.pairs,
    Forms.pairs,
    Forms.pairs,
    Forms.pairs,
    Forms.cities,
    Forms.pass_keys,
)
