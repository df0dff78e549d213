"""RULER's synthetic tasks (arXiv 2404.06654): constructions, templates, budgets as published, so that scores compare.

The eight needle tasks, variable tracking, common words and frequent words need no download; question answering takes
SQuAD or HotpotQA from a local file (questions.py). What differs: words come from our own lists, and essays are
generated prose or a text that the user names, because Paul Graham's essays are not bundled.
"""

import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.bench.quality.examples import Example, Turn, rng_of
from retrieval_attn.bench.shared import facts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

# Places for needles in an essay, as shares of its sentences; RULER's forty.
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100

NIAH_TOKENS, VT_TOKENS, CWE_TOKENS, FWE_TOKENS = 128, 30, 120, 50


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack. haystack: "noise" (one sentence group, repeated), "essay" or "needle" (other needles);
    keys and values: "words", "numbers" or "uuids"."""

    haystack: str
    keys: str
    values: str
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise", "words", "numbers"),
    "niah_single_2": Niah("essay", "words", "numbers"),
    "niah_single_3": Niah("essay", "words", "uuids"),
    "niah_multikey_1": Niah("essay", "words", "numbers", n_keys=4),
    "niah_multikey_2": Niah("needle", "words", "numbers"),
    "niah_multikey_3": Niah("needle", "uuids", "uuids"),
    "niah_multivalue": Niah("essay", "words", "numbers", n_values=4),
    "niah_multiquery": Niah("essay", "words", "numbers", n_keys=4, n_queries=4),
}

TASKS = (*NIAH, "vt", "cwe", "fwe")

RETRIEVAL = tuple(NIAH)


def ruler_maker(task: str, n_tokens: int, sample: int, seed: int, text: str | None) -> Callable[[int], Example]:
    """What `fit` asks for examples of growing size. text: the essay; None takes generated prose.

    task: one of TASKS; ValueError for others. The same arguments give the same examples.
    """
    name = f"{n_tokens}-{sample}"
    words = (seed, task, n_tokens, sample)
    if task in NIAH:
        needles = _Needles(NIAH[task], rng_of(*words), facts.Essay(text, rng_of(*words, "essay")))
        return lambda size: needles.example(task, name, size)
    makers = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
    if task not in makers:
        raise ValueError(f"unknown RULER task {task!r}; choose from {', '.join(TASKS)}")
    return lambda size: makers[task](name, size, rng_of(*words), n_tokens)


class Names:
    """Different keys and values of a kind, however many are drawn."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drawn: set[str] = set()

    def draw(self, kind: str) -> str:
        """A word pair, a number of seven digits, or a UUID, that was not drawn before."""
        name, tries = _MAKE[kind](self._rng), 1
        while name in self._drawn:
            # Most pairs of words are taken in a million tokens; longer names go on for ever.
            name = _MAKE[kind](self._rng) if tries < 16 else f"{name}-{_MAKE[kind](self._rng)}"
            tries += 1
        self._drawn.add(name)
        return name


def _word(rng: np.random.Generator) -> str:
    adjective, noun = rng.integers(len(facts.ADJECTIVES)), rng.integers(len(facts.NOUNS))
    return f"{facts.ADJECTIVES[adjective]}-{facts.NOUNS[noun]}"


def make_uuid(rng: np.random.Generator) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


_MAKE: dict[str, Callable[[np.random.Generator], str]] = {
    "words": _word,
    "numbers": lambda rng: str(rng.integers(10**6, 10**7)),
    "uuids": make_uuid,
}


def ask_for(kind: str, keys: Sequence[str], n_answers: int) -> tuple[str, str, str]:
    """What RULER says before a haystack, after it, and at the beginning of the answer."""
    if n_answers == 1:
        one = kind.removesuffix("s")
        begin = (
            f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {one} afterwards.\n"
        )
        about = f"the special magic {one} for {keys[0]} mentioned in the provided text"
        return begin, f"\nWhat is {about}?", f" The{about.removeprefix('the')} is"
    begin = (
        f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind} afterwards.\n"
    )
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    about = f"the special magic {kind} for {listed} mentioned in the provided text"
    return begin, f"\nWhat are all {about}?", f" The{about.removeprefix('the')} are"


class _Needles:
    """The examples of one sample: the same needles in haystacks of any size."""

    def __init__(self, kind: Niah, rng: np.random.Generator, essay: facts.Essay) -> None:
        self._kind, self._essay = kind, essay
        self._names = Names(rng)
        n_keys = max(kind.n_keys, kind.n_queries)
        self._keys = [self._names.draw(kind.keys) for _ in range(n_keys)]
        self._values = [[self._names.draw(kind.values) for _ in range(kind.n_values)] for _ in range(n_keys)]
        self._order = rng.permutation(n_keys * kind.n_values)
        self._asked = rng.permutation(n_keys)[: kind.n_queries]
        n = n_keys * kind.n_values
        # Lines of noise and of needles take needles anywhere.
        self._depths = np.sort(rng.permutation(DEPTHS)[:n] if kind.haystack == "essay" else rng.random(n))
        self._rng = rng
        self._straw: list[str] = []

    def example(self, task: str, name: str, size: int) -> Example:
        kind = self._kind
        pairs = [(key, value) for key, values in zip(self._keys, self._values, strict=True) for value in values]
        needles = [NEEDLE.format(kind=kind.values, key=pairs[i][0], value=pairs[i][1]) for i in self._order]
        keys = [self._keys[i] for i in self._asked]
        refs = tuple(value for i in self._asked for value in self._values[i])
        begin, ask, prefix = ask_for(kind.values, keys, len(refs))
        haystack = self._haystack(needles, size)
        turn = Turn(ask, refs, "all", NIAH_TOKENS, prefix, golden=", ".join(refs), depth=self._depth(haystack, refs))
        return Example(task, name, begin + haystack, (turn,), facts={"needles": needles})

    def _haystack(self, needles: list[str], size: int) -> str:
        if self._kind.haystack == "essay":
            sentences = facts.split_sentences(self._essay.words(size))
            return inserted_text(sentences, needles, [int(depth * len(sentences)) for depth in self._depths])
        lines = [NOISE] * size if self._kind.haystack == "noise" else self._others(size)
        places = [int(depth * len(lines)) for depth in self._depths]
        return "\n".join(inserted(lines, needles, places))

    def _others(self, size: int) -> list[str]:
        kind = self._kind
        while len(self._straw) < size:
            key, value = self._names.draw(kind.keys), self._names.draw(kind.values)
            self._straw.append(NEEDLE.format(kind=kind.values, key=key, value=value))
        return self._straw[:size]

    def _depth(self, haystack: str, refs: Sequence[str]) -> float | None:
        """Where the answer stands; of several there is no one place."""
        return haystack.index(refs[0]) / len(haystack) if len(refs) == 1 else None


def inserted(pieces: Sequence[Any], new: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """`new`, each before the piece of its place; places ascend."""
    out, start = [], 0
    for piece, place in zip(new, places, strict=True):
        out += [*pieces[start:place], piece]
        start = place
    return [*out, *pieces[start:]]


def inserted_text(sentences: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Needles between sentences, which keep the white space that follows them; a blank follows the last."""
    ended = [*sentences[:-1], f"{sentences[-1]} "]
    return "".join(inserted(ended, [f"{needle} " for needle in needles], places)).rstrip()


VT_BEGIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_ASK = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
# "assgined" is how it was published.
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assgined the value "
    "{value}, they are: "
)


class Chain(NamedTuple):
    """Variables that all have one value: the first is assigned it, each other one the one before."""

    names: list[str]
    value: str


def variable_tracking(name: str, size: int, rng: np.random.Generator, n_tokens: int) -> Example:
    """One chain of four hops in noise, after a worked example; all five names are wanted. size: groups of noise."""
    shown = draw_chains(1, 4, rng, letters=3)[0]._replace(value="12345")
    chain = draw_chains(1, 4, rng)[0]
    ask, prefix = (text.format(n=len(chain.names), value=chain.value) for text in (VT_ASK, VT_PREFIX))
    worked = VT_BEGIN + in_noise([shown], 5, rng)
    worked += (VT_ASK + VT_PREFIX).format(n=len(shown.names), value=shown.value) + " ".join(shown.names) + "\n\n\n\n"
    turn = Turn(ask, tuple(chain.names), "all", VT_TOKENS, prefix, golden=" ".join(chain.names))
    return Example("vt", name, worked + VT_BEGIN + in_noise([chain], size, rng), (turn,), facts={"chains": [chain]})


def draw_chains(n_chains: int, n_hops: int, rng: np.random.Generator, letters: int = 5) -> list[Chain]:
    """Chains with different names and values."""
    alphabet, names, values = list(string.ascii_uppercase), dict[str, None](), dict[str, None]()
    while len(names) < n_chains * (n_hops + 1):
        names["".join(rng.choice(alphabet, letters))] = None
    while len(values) < n_chains:
        values[str(rng.integers(10000, 99999))] = None
    parts = np.array_split(list(names), n_chains)
    return [Chain(part.tolist(), value) for part, value in zip(parts, values, strict=True)]


def in_noise(chains: Sequence[Chain], size: int, rng: np.random.Generator) -> str:
    """The assignments of each chain in order, at random places among `size` groups of noise."""
    lines = [NOISE + "\n"] * size
    for names, value in chains:
        own = [f"VAR {names[0]} = {value}\n"] + [f"VAR {b} = VAR {a} \n" for a, b in pairwise(names)]
        places = np.sort(rng.integers(0, len(lines) + 1, len(own)))
        lines = inserted(lines, own, places.tolist())
    return "".join(lines).rstrip("\n")


CWE_BEGIN = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
CWE_ASK = "\nQuestion: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
N_COMMON = 10

# Contexts shorter than this repeat words less often, as in RULER.
CWE_SHORT = 4096


def common_words(name: str, size: int, rng: np.random.Generator, n_tokens: int) -> Example:
    """Ten words that a numbered list holds more often than the others, after a worked example. size: other words."""
    short = n_tokens < CWE_SHORT
    often, seldom = (6, 1) if short else (30, 3)
    vocabulary = Names(rng)
    shown, shown_common = _word_list(20 if short else 40, *((3, 1) if short else (10, 3)), vocabulary, rng)
    listed, common = _word_list(N_COMMON + size, often, seldom, vocabulary, rng)
    worked = CWE_BEGIN + shown + CWE_ASK + CWE_PREFIX + " " + _numbered(shown_common) + "\n"
    turn = Turn(CWE_ASK, tuple(common), "all", CWE_TOKENS, CWE_PREFIX, golden=_numbered(common))
    return Example("cwe", name, worked + CWE_BEGIN + listed, (turn,), facts={"often": often, "seldom": seldom})


def _word_list(
    n_words: int, often: int, seldom: int, vocabulary: Names, rng: np.random.Generator
) -> tuple[str, list[str]]:
    words = [_common_word(vocabulary) for _ in range(n_words)]
    common = words[:N_COMMON]
    everything = common * often + words[N_COMMON:] * seldom
    return _numbered([everything[i] for i in rng.permutation(len(everything))]), common


def _common_word(vocabulary: Names) -> str:
    """A word of the word list: pairs run together, because the lists alone are too short for long contexts."""
    return vocabulary.draw("words").replace("-", "")


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


FWE_BEGIN = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
FWE_ASK = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
FWE_ALPHA, FWE_LETTERS, TOKENS_PER_CODED_WORD = 2.0, 6, 50


def frequent_words(name: str, size: int, rng: np.random.Generator, n_tokens: int) -> Example:
    """Coded words whose counts fall as rank ** -2; the first is dots, and the next three are wanted. size: words."""
    n_words = max(4, n_tokens // TOKENS_PER_CODED_WORD)
    letters = list(string.ascii_lowercase)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < n_words:
        vocabulary["".join(rng.choice(letters, FWE_LETTERS))] = None
    words = ["...", *list(vocabulary)[1:]]
    ranks = np.arange(1, n_words + 1, dtype=np.float64)
    # zeta(2) = pi ** 2 / 6; no fewer than 4, 3 and 2 of the wanted ones, so that they can be told.
    counts = (size * ranks**-FWE_ALPHA / (np.pi**2 / 6)).astype(np.int64)
    counts[:4] = np.maximum(counts[:4], (5, 4, 3, 2))
    text = np.repeat(np.arange(n_words), counts)
    coded = " ".join(words[i] for i in rng.permutation(text))
    refs = tuple(words[1:4])
    turn = Turn(FWE_ASK, refs, "all", FWE_TOKENS, FWE_PREFIX, golden=", ".join(refs))
    return Example("fwe", name, FWE_BEGIN + coded, (turn,))
