"""Seeded long texts with facts hidden in them, and the questions that find them again.

Everything here is a pure function of its arguments: the same seed gives the same bytes on any machine.
Needs only the standard library and numpy.

    facts = make_facts(50, seed=1)
    text = plant(prose(40_000, seed=2), facts)              # spread evenly from start to end
    doc = document(count_tokens, n_tokens=8192, n_facts=50, seed=3)
    f"{doc.text}\\n\\n{doc.facts[0].question}"              # the prompt; the reply should be doc.facts[0].answer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

__all__ = ["Document", "Essay", "Fact", "document", "make_facts", "plant", "prose", "sentences", "split_sentences"]


@dataclass(frozen=True)
class Fact:
    """One sentence to hide and the question that asks for its last words.

    entity: whom or what the fact is about; unique within one `make_facts` call.
    attribute: what is told about it, such as "access code".
    value: digits, or one or two words; stands at the end of the sentence, before the full stop.
    """

    entity: str
    attribute: str
    value: str
    sentence: str
    question: str

    @property
    def subject(self) -> str:
        """The entity, under its grammatical name."""
        return self.entity

    @property
    def answer(self) -> str:
        """What a reader of the text should reply: the value alone."""
        return self.value


@dataclass(frozen=True)
class Document:
    """A text with facts in it. depths[i] is where facts[i] stands: 0.0 at the start, 1.0 at the end."""

    text: str
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST_NAMES = _listed(
    "Ada Alma Anton Arlo Astrid Basil Bela Birgit Boris Bruno Cora Cyril Dagny Dora Edda Egon Elsa Emil Enid Erik "
    "Fanny Felix Flora Frida Gerda Gideon Greta Gustav Hanna Hector Hilda Hugo Ida Igor Ingrid Iris Ivo Jasper "
    "Jonas Judith Karin Klaus Lena Leo Linus Lotte Magda Magnus Marta Milo Mira Nadia Nils Nora Olga Oscar Otto "
    "Petra Piers Rasmus Rita Rolf Rosa Rufus Selma Sigrid Silas Simon Stella Sven Tessa Thea Tilda Tobias Ursula "
    "Vera Viktor Wanda Wilma Yuri Zelda"
)
ONSETS = _listed("B Br C Cr D Dr F Fl G Gr H J K Kr L M N P Pr R S Sk St T Tr V W Y Z Th Sh Gl")
VOWELS = _listed("a e i o u ai ea io or ar el il an en on")
MIDDLES = _listed("b d g k l m n r s t v z nd rn ld st rk lm")
ENDINGS = _listed("a o en er ow ick ard ley ham by stone field wick mere dal berg holm ton ford ova ino esk")
SHIP_KINDS = _listed("ship barge ferry schooner steamer tug trawler lighthouse mine inn chapel mill tavern orchard")
ADJECTIVES = _listed(
    "amber ancient black blue bold brass brave bright broken bronze calm clever cold copper crimson crooked "
    "curious dark distant eager early empty fair faithful fierce frozen gentle gilded glad golden grand green "
    "grey happy heavy hidden hollow humble idle iron ivory jolly keen kind late lazy little lonely lost loud "
    "lucky merry mighty mild misty narrow noble odd old pale patient plain proud purple quick quiet rapid red "
    "restless rough royal rusty sad scarlet secret shy silent silver simple sleepy slow small smooth soft solemn "
    "steady stern stormy strange sunny swift tall tame tender thin tiny violet warm weary white wild wise yellow "
    "young"
)
NOUNS = _listed(
    "anchor apple arrow badger barrel basket beacon bear bell birch boat book bottle bread bridge broom bucket "
    "button cabin camel candle carpet castle cat cedar chair cherry clock cloud coat compass crow crown cup daisy "
    "deer dog door dove drum duck eagle engine falcon feather fiddle finch fish flag flute forest fox garden gate "
    "ghost glove goat goose hammer harp hat hawk hazel hedge heron horn horse house kettle key kite ladder lamp "
    "lantern lark leaf lemon letter lily lion lizard maple marble market mirror mole moon moth mouse needle nest "
    "oak orange otter owl paper pear pebble pencil piano pigeon pine pipe plum pony rabbit raven ribbon river "
    "robin rocket rope rose saddle sail salmon shell shield shoe sparrow spider spoon stable star stone stove "
    "swan table tiger tower trumpet tulip turtle umbrella village violin wagon walnut whale wheel whistle willow "
    "window wolf wren"
)
CITIES = _listed(
    "Accra Algiers Amsterdam Ankara Athens Baghdad Baku Bangkok Barcelona Beirut Belgrade Berlin Bogota Boston "
    "Brussels Bucharest Budapest Cairo Caracas Chicago Copenhagen Dakar Damascus Delhi Dhaka Doha Dublin Geneva "
    "Hanoi Havana Helsinki Houston Istanbul Jakarta Kabul Kampala Kiev Kyoto Lagos Lima Lisbon London Madrid "
    "Manila Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Paris Prague Quito Riga "
    "Riyadh Rome Santiago Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Taipei Tehran Tokyo Toronto "
    "Tripoli Tunis Venice Vienna Warsaw Zagreb Zurich"
)

NUMBER_ATTRIBUTES = (
    "access code",
    "account number",
    "badge number",
    "door code",
    "ledger number",
    "locker number",
    "permit number",
    "secret number",
    "ticket number",
    "vault number",
)
WORD_ATTRIBUTES = (
    "password",
    "emblem",
    "favourite thing",
    "hidden treasure",
    "lucky charm",
    "nickname",
    "passphrase",
    "secret word",
    "signal",
    "watchword",
)
# {e} is the entity, {a} the attribute, {v} the value.
STATEMENTS = (
    "The {a} of {e} is {v}.",
    "The {a} of {e} was {v}.",
    "The {a} for {e} is {v}.",
    "As everyone knew, the {a} of {e} was {v}.",
    "It was written on the wall that the {a} of {e} is {v}.",
    "Remember that the {a} of {e} is {v}.",
    "In the end the {a} chosen for {e} was {v}.",
    "According to the register, the {a} of {e} is {v}.",
    "The clerk noted that the {a} of {e} was {v}.",
    "Nobody should forget that the {a} for {e} is {v}.",
)
QUESTIONS = (
    "What is the {a} of {e}?",
    "What was the {a} of {e}?",
    "What is the {a} for {e}?",
    "Tell me the {a} of {e}.",
    "Which {a} belongs to {e}?",
    "According to the text, what is the {a} of {e}?",
    "Please look up the {a} of {e}.",
    "Do you remember the {a} of {e}?",
)
CITY_STATEMENT = "The special magic {e} number is: {v}."
CITY_QUESTIONS = ("What is the special magic {e} number?", "Tell me the special magic {e} number.")
KEY_STATEMENT = "One of the special magic numbers for {e} is: {v}."
KEY_QUESTIONS = (
    "What is the special magic number for {e} mentioned in the provided text?",
    "What is the special magic number for {e}?",
)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _place_name(rng: np.random.Generator) -> str:
    return _pick(rng, ONSETS) + _pick(rng, VOWELS) + _pick(rng, MIDDLES) + _pick(rng, ENDINGS)


def _entity(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.45:
        return f"{_pick(rng, FIRST_NAMES)} {_place_name(rng)}"
    if kind < 0.7:
        return _place_name(rng)
    return f"the {_pick(rng, SHIP_KINDS)} {_pick(rng, ADJECTIVES).title()} {_pick(rng, NOUNS).title()}"


def _digits(rng: np.random.Generator, n: int) -> str:
    return str(int(rng.integers(10 ** (n - 1), 10**n)))


def _words(rng: np.random.Generator) -> str:
    noun = _pick(rng, NOUNS)
    return noun if rng.random() < 0.3 else f"{_pick(rng, ADJECTIVES)} {noun}"


def _fact(rng: np.random.Generator) -> Fact:
    style = rng.random()
    if style < 0.1:
        entity, attribute, value = _pick(rng, CITIES), "special magic number", _digits(rng, 7)
        statement, question = CITY_STATEMENT, _pick(rng, CITY_QUESTIONS)
    elif style < 0.2:
        entity = f"{_pick(rng, ADJECTIVES)}-{_pick(rng, NOUNS)}"
        attribute, value = "special magic number", _digits(rng, 7)
        statement, question = KEY_STATEMENT, _pick(rng, KEY_QUESTIONS)
    else:
        entity = _entity(rng)
        if rng.random() < 0.5:
            attribute, value = _pick(rng, NUMBER_ATTRIBUTES), _digits(rng, int(rng.integers(4, 8)))
        else:
            attribute, value = _pick(rng, WORD_ATTRIBUTES), _words(rng)
        statement, question = _pick(rng, STATEMENTS), _pick(rng, QUESTIONS)
    fill = {"e": entity, "a": attribute, "v": value}
    return Fact(entity, attribute, value, statement.format(**fill), question.format(**fill))


def make_facts(n: int, seed: int) -> list[Fact]:
    """n facts about n different entities. Every value differs from every other.

    Several kinds: codes of people and places, watchwords of two words, and the two needle styles known from
    MInference ("The special magic {city} number is: ...") and RULER ("One of the special magic numbers for ...").
    Raises ValueError for n < 0 or n > 20,000 (the values would run out).
    """
    if not 0 <= n <= 20_000:
        raise ValueError(f"n must be between 0 and 20,000, got {n}")
    rng = np.random.default_rng([seed, 0xFAC7])
    facts: list[Fact] = []
    entities: set[str] = set()
    values: set[str] = set()
    while len(facts) < n:
        fact = _fact(rng)
        if fact.entity not in entities and fact.value not in values:
            facts.append(fact)
            entities.add(fact.entity)
            values.add(fact.value)
    return facts


WORDS = {
    "person": (
        "the miller|the captain|an old sailor|the schoolmaster|the baker's daughter|a young clerk|the widow|the mayor|"
        "a travelling merchant|the shepherd|the doctor|her brother|his aunt|the night watchman|the printer|a stranger|"
        "the ferryman|the gardener|the innkeeper|two fishermen|the twins|the judge|a tired soldier|the weaver"
    ),
    "place": (
        "the harbour|the market square|the old bridge|the northern road|the river bank|the town hall|a small village|"
        "the cathedral|the lower valley|the railway station|the edge of the forest|the customs house|the hill farm|"
        "the lighthouse|the quarry|the salt marsh|the island|the upper meadow|the capital|a narrow lane"
    ),
    "goods": (
        "wool|barley|salted fish|timber|copper wire|lamp oil|cheese|honey|coal|glass beads|rope|dried apples|tea|"
        "sailcloth|iron nails|paper|leather|wine|flour|candles"
    ),
    "weather": (
        "a cold wind|heavy rain|thick fog|the first snow|a mild breeze|a sudden storm|bright sunshine|grey drizzle|"
        "a hard frost|thunder from the west|a long drought|low cloud"
    ),
    "time": (
        "in the early morning|before noon|late in the evening|on market day|during the long winter|at the end of May|"
        "after the harvest|on the third day|that autumn|shortly before midnight|for many weeks|every spring|"
        "when the tide was low|on the day of the fair"
    ),
    "feeling": (
        "pleased|uneasy|tired|hopeful|suspicious|grateful|puzzled|content|impatient|calm|ashamed|curious|relieved|proud"
    ),
    "did": (
        "walked to|hurried towards|came back from|stayed near|looked across|wrote a letter about|sent a message to|"
        "remembered|drew a map of|set out for|settled near|travelled through|complained about|dreamed of"
    ),
    "thing": (
        "a wooden box|the broken clock|an unpaid bill|a letter from abroad|the spare key|a pair of boots|"
        "the church bell|a basket of eggs|the second boat|a lame horse|an umbrella|the account book|"
        "a brass telescope|the garden gate"
    ),
    "verb": "sold|bought|repaired|carried|counted|lost|hid|borrowed|praised|measured|painted|forgot|returned|examined",
    "adverb": "slowly|with great care|in silence|without a word|at once|as usual|by mistake|against all advice|gladly",
    "link": "because|although|while|so that|after|until|before|since",
    "opinion": (
        "nothing would ever change|the price was too high|the road was safe|it would rain again|the news was false|"
        "strangers were welcome|the bridge would not hold|there was time enough|the harvest would be good|"
        "one should not ask too many questions|a promise is a promise|the old ways were better"
    ),
}
BANK = {kind: words.split("|") for kind, words in WORDS.items()}
PATTERNS = (
    "{time} {person} {did} {place}.",
    "{person} {did} {place} {link} {person} {verb} {thing}.",
    "{weather} lay over {place} {time}.",
    "{person} was {feeling} {link} {weather} had reached {place}.",
    "{time}, {goods} and {goods} were sold at {place}.",
    "{person} {verb} {thing} {adverb}.",
    '"{opinion}," said {person}, and {did} {place}.',
    "{person} believed that {opinion}.",
    "the price of {goods} rose {time}, and {person} was {feeling}.",
    "from {place} one could see {place}, {link} {weather} came {time}.",
    "{person} asked {person} about {thing}, but the answer was that {opinion}.",
    "nobody at {place} had seen {thing} since {person} {verb} it {adverb}.",
    "there was {goods} enough for everyone, and {person} {verb} {thing}.",
    "a cart of {goods} stood near {place} {time}.",
    "was it true that {opinion}? {person} was not sure, and {did} {place}.",
    "{adverb}, {person} {verb} {thing} and {did} {place}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


def _capital(sentence: str) -> str:
    first = 1 if sentence.startswith('"') else 0
    sentence = sentence[:first] + sentence[first].upper() + sentence[first + 1 :]
    return re.sub(r"([?] )(\w)", lambda match: match[1] + match[2].upper(), sentence)


def sentences(seed: int) -> Iterator[str]:
    """Endless plain English sentences about a valley, its people, weather and trade. They hold no facts."""
    rng = np.random.default_rng([seed, 0x9205E])
    while True:
        yield _capital(_SLOT.sub(lambda slot: _pick(rng, BANK[slot[1]]), _pick(rng, PATTERNS)))


def _until(pieces: Iterator[str], n_chars: int) -> Iterator[str]:
    total = 0
    while total < n_chars:
        piece = next(pieces)
        total += len(piece) + 1
        yield piece


def prose(n_chars: int, seed: int) -> str:
    """At least n_chars characters of `sentences(seed)`, ending with a whole sentence, in paragraphs."""
    return _paragraphs(list(_until(sentences(seed), n_chars)), seed)


def _paragraphs(pieces: Sequence[str], seed: int) -> str:
    rng = np.random.default_rng([seed, 0x9A6])
    out, rest = [], iter(pieces)
    while block := list(islice(rest, int(rng.integers(4, 12)))):
        out.append(" ".join(block))
    return "\n\n".join(out)


# Real books break lines anywhere; a sentence ends in .!? (and perhaps a quote) before white space.
_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?])(?P<gap>\s+)|(?<=[.!?][\"”\u2019])(?P<quoted>\s+)")


def split_sentences(text: str) -> list[str]:
    """Cut text after its sentences. The pieces keep their white space: joined by "", they are the text again."""
    cuts = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if b > a]


def plant(filler: str | Sequence[str], facts: Sequence[Fact], depths: Sequence[float] | None = None) -> str:
    """Put the facts' sentences between the filler's sentences.

    filler: a text, or sentences (joined by a blank).
    depths: one number in [0, 1] for each fact, its share of the filler's characters that stand before it;
        None spreads the facts evenly.
    Raises ValueError when the numbers of facts and depths differ or a depth lies outside [0, 1].
    """
    if depths is None:
        depths = [(i + 0.5) / len(facts) for i in range(len(facts))]
    if len(depths) != len(facts):
        raise ValueError(f"depths must have one entry per fact ({len(facts)}), got {len(depths)}")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must lie between 0 and 1, got {min(depths)} to {max(depths)}")
    pieces = split_sentences(filler) if isinstance(filler, str) else [sentence + " " for sentence in filler]
    ends = np.cumsum([0] + [len(piece) for piece in pieces])
    slots = np.searchsorted(ends, np.asarray(depths, dtype=np.float64) * ends[-1])
    planted: dict[int, list[str]] = {}
    for i in np.argsort(depths, kind="stable"):
        planted.setdefault(min(int(slots[i]), len(pieces)), []).append(facts[i].sentence)
    out: list[str] = []
    for i in range(len(pieces) + 1):
        for sentence in planted.get(i, []):
            _append_sentence(out, sentence)
        if i < len(pieces):
            out.append(pieces[i])
    return "".join(out).strip()


def _append_sentence(out: list[str], sentence: str) -> None:
    """Add a sentence with one blank before it, and the white space that stood there behind it."""
    before = out[-1] if out else ""
    body = before.rstrip()
    if out:
        out[-1] = body
    out.append((" " if body else "") + sentence + (before[len(body) :] or " "))


def document(
    count_tokens: Callable[[str], int],
    n_tokens: int,
    n_facts: int,
    seed: int,
    filler: str | None = None,
) -> Document:
    """A text of n_tokens tokens (within 1 %) with n_facts facts at all depths.

    count_tokens: the length of a text in tokens, for the model that will read it.
    filler: a text to hide the facts in, used from a seeded place on and again from its start if too short;
        None takes generated prose.
    Raises ValueError when the facts alone are longer than n_tokens.
    """
    facts = make_facts(n_facts, seed)
    needed = count_tokens(" ".join(fact.sentence for fact in facts)) if facts else 0
    if needed > n_tokens:
        raise ValueError(f"n_tokens must be at least {needed} to hold {n_facts} facts, got {n_tokens}")
    rng = np.random.default_rng([seed, 0xD0C])
    depths = sorted((i + float(rng.random())) / n_facts for i in range(n_facts))
    sample = _filler(filler, 20_000, seed)
    n_chars = int((n_tokens - needed) * len(sample) / count_tokens(sample))
    for attempt in range(12):
        text = plant(_filler(filler, n_chars, seed, whole=attempt < 6), facts, depths)
        error = n_tokens - count_tokens(text)
        if abs(error) <= max(n_tokens // 200, 1):
            break
        n_chars = max(0, n_chars + int(error * len(sample) / count_tokens(sample)))
    return Document(text, tuple(facts), tuple(depths))


def _filler(filler: str | None, n_chars: int, seed: int, whole: bool = True) -> str:
    """About n_chars characters, ending with a whole sentence or cut short after a word."""
    if filler is None:
        text = prose(n_chars, seed) if n_chars else ""
        return text if whole else _cut(text[:n_chars])
    start = int(np.random.default_rng([seed, 0xF1]).integers(len(filler)))
    start = next((match.end() for match in _SENTENCE_END.finditer(filler, start)), 0) % len(filler)
    turns = 1 + (start + n_chars) // len(filler)
    text = (filler * (turns + 1))[start : start + n_chars]
    ends = [match.end() for match in _SENTENCE_END.finditer(text, max(0, n_chars - 2000))]
    return text[: ends[-1]] if whole and ends else _cut(text)


class Essay:
    """An endless text in words: one that a user named, from a seeded place on and again from its start, or generated
    prose. Shorter stretches are the beginnings of longer ones."""

    def __init__(self, text: str | None, rng: np.random.Generator) -> None:
        self._text = None if text is None else text.split()
        self._start = 0 if not self._text else int(rng.integers(len(self._text)))
        self._seed = int(rng.integers(1 << 31))
        self._words: list[str] = []

    def words(self, n: int) -> str:
        """Its first n words, a blank between them."""
        if len(self._words) < n:
            self._words = self._of_text(n) if self._text else self._generated(n)
        return " ".join(self._words[:n])

    def _of_text(self, n: int) -> list[str]:
        assert self._text is not None
        turns = 1 + (self._start + n) // len(self._text)
        return (self._text * turns)[self._start :][:n]

    def _generated(self, n: int) -> list[str]:
        words: list[str] = []
        for sentence in sentences(self._seed):
            words += sentence.split()
            if len(words) >= 2 * n:
                break
        return words


def _cut(text: str) -> str:
    """The whole words of text, and a full stop."""
    words = text.rstrip().rpartition(" ")[0].rstrip(" ,;:.-")
    return f"{words}." if words else ""
