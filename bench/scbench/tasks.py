"""SCBench's tasks that need no download (arXiv 2412.10319): one context, several turns about it.

Constructions follow the paper and, where it built on them, InfiniteBench and RULER; templates and budgets are those of
the published harness. Two things are ours: both modes read one context, as the harness has it for many turns (for many
requests it leaves the blank line behind the context away, and begins Math.Find otherwise); and prose stands in for code
and documents in the mixed tasks, of which only the halves without a download are made. `files.py` reads the
published files.
"""

import json
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from statistics import median

import numpy as np

from retrieval_attn.bench.quality.examples import Example, Turn, rng_of
from retrieval_attn.bench.ruler.tasks import VT_BEGIN, Names, draw_chains, in_noise, inserted_text, make_uuid
from retrieval_attn.bench.shared import facts

N_TURNS = 5

# Room for an answer, by task.
MAX_NEW_TOKENS = {
    "kv": 150,
    "kv_short": 40,
    "prefix_suffix": 150,
    "vt": 30,
    "mf": 5,
    "many_shot": 10,
    "mix_kv": 80,
    "mix_kv_short": 40,
    "mix_passkey": 15,
}

STRING_RETRIEVAL = ("kv", "kv_short", "prefix_suffix", "vt")

TASKS = ("kv", "kv_short", "prefix_suffix", "vt", "mf", "many_shot", "mix_kv", "mix_kv_short", "mix_passkey")

KV_BEGIN = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
KV_ASK = '\nKey: "{key}"\nThe value associated with the specified key is: '
PREFIX_SUFFIX_ASK = "Prefix: {prefix}; Suffix: {suffix}. The word with both prefix and suffix from the dict is"
VT_ASK = "Question: Find all variables that are assigned the value {value} in the text above."
MF_ASK = "You should answer with only one number, no other words. {what} of the list is: "
# Before the context for the first question, and before every other one.
MF_BEGIN = "What is {what}?\n\n"
PASSKEY_BEGIN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information.\n\n"
)
PASSKEY = "The pass key {name} is {key}. Remember it. {key} is the pass key {name}."
PASSKEY_ASK = "What is the pass key {name}? The pass key {name} is"
BLANK_LINE = "\n\n"


def scbench_maker(task: str, n_tokens: int, sample: int, seed: int, text: str | None) -> Callable[[int], Example]:
    """What `fit` asks for examples of growing size. text: the prose of mixed tasks; None takes generated prose.

    task: one of TASKS; ValueError for others. The same arguments give the same examples.
    """
    if task not in _MAKERS:
        raise ValueError(f"unknown SCBench task {task!r}; choose from {', '.join(TASKS)}")
    name, words = f"{n_tokens}-{sample}", (seed, task, n_tokens, sample)
    essay = facts.Essay(text, rng_of(*words, "essay"))

    def make(size: int) -> Example:
        context, turns, known = _MAKERS[task](size, rng_of(*words), essay)
        return Example(task, name, context, tuple(turns), BLANK_LINE, known)

    return make


Made = tuple[str, list[Turn], dict[str, object]]


def _spread(n: int, rng: np.random.Generator) -> list[int]:
    """N_TURNS places among n, one in each fifth, in random order; fewer where there are fewer."""
    n_turns = min(N_TURNS, n)
    places = [int((i + rng.random()) * n / n_turns) for i in range(n_turns)]
    return [places[i] for i in rng.permutation(n_turns)]


def key_values(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Retr.KV: a JSON object of random keys and values. size: pairs."""
    pairs = [(make_uuid(rng), make_uuid(rng)) for _ in range(size)]
    context = f"{KV_BEGIN}JSON data:\n{json.dumps(dict(pairs))}"
    turns = [_kv_turn(context, *pairs[i]) for i in _spread(size, rng)]
    return context, turns, {"pairs": dict(pairs)}


def short_key_values(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Retr.KV with keys of two words and values of seven digits, for models too small to copy UUIDs. size: pairs."""
    names = Names(rng)
    pairs = [(names.draw("words"), names.draw("numbers")) for _ in range(size)]
    context = f"{KV_BEGIN}JSON data:\n{json.dumps(dict(pairs))}"
    turns = [_kv_turn(context, *pairs[i], task="kv_short") for i in _spread(size, rng)]
    return context, turns, {"pairs": dict(pairs)}


def _kv_turn(context: str, key: str, value: str, task: str = "kv") -> Turn:
    depth = context.index(value) / len(context)
    return Turn(
        KV_ASK.format(key=key), (value,), "contains", MAX_NEW_TOKENS[task], golden=value, depth=depth, part="kv"
    )


# Entries of the dictionary, between two quotes: letters of both cases.
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
AFFIX = 5


def draw_strings(n: int, rng: np.random.Generator) -> list[str]:
    """Different random strings of 20 to 25 letters."""
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(rng.choice(LETTERS, int(rng.integers(20, 26))))] = None
    return list(words)


def ask_for_word(word: str) -> str:
    """The question whose answer is this word."""
    return PREFIX_SUFFIX_ASK.format(prefix=word[:AFFIX], suffix=word[-AFFIX:])


def prefix_suffix(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Retr.Prefix-Suffix: a dictionary of random strings. size: strings."""
    entries = draw_strings(size, rng)
    context = "dict = " + json.dumps(entries)
    turns = [
        Turn(
            ask_for_word(word),
            (word,),
            "contains",
            MAX_NEW_TOKENS["prefix_suffix"],
            golden=word,
            depth=context.index(word) / len(context),
        )
        for word in (entries[i] for i in _spread(size, rng))
    ]
    return context, turns, {"entries": entries}


def multi_hop(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Retr.MultiHop: RULER's chains of assignments, of two hops, a turn for each chain. size: groups of noise."""
    chains = draw_chains(N_TURNS, 2, rng)
    turns = [
        Turn(VT_ASK.format(value=value), tuple(names), "all", MAX_NEW_TOKENS["vt"], golden=str(names))
        for names, value in chains
    ]
    return VT_BEGIN + in_noise(chains, size, rng), turns, {"chains": chains}


RANKS = {
    "The largest number": lambda distinct, every: distinct[-1],
    "The second largest number": lambda distinct, every: distinct[-2],
    "The third largest number": lambda distinct, every: distinct[-3],
    "The smallest number": lambda distinct, every: distinct[0],
    "The second smallest number": lambda distinct, every: distinct[1],
    "The third smallest number": lambda distinct, every: distinct[2],
    "The median number": lambda distinct, every: median(every),
}


def math_find(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Math.Find: integers below a thousand, in a range that is narrowed first, and their extremes. size: triples."""
    top, bottom = int(rng.integers(800, 1000)), int(rng.integers(0, 200))
    numbers = rng.integers(bottom, top + 1, 3 * size + 3).tolist()
    # An odd count, so that the median is one of them.
    numbers = numbers[: len(numbers) - (len(numbers) + 1) % 2]
    distinct, every = sorted(set(numbers)), sorted(numbers)
    asked = [list(RANKS)[i] for i in rng.permutation(len(RANKS))[:N_TURNS]]
    refs = [str(int(RANKS[what](distinct, every))) for what in asked]
    begins = [MF_BEGIN.format(what=f"{what.lower()} of the list") for what in asked]
    turns = [
        Turn(begin + MF_ASK.format(what=what), (ref,), "number", MAX_NEW_TOKENS["mf"], golden=ref)
        for begin, what, ref in zip(["", *begins[1:]], asked, refs, strict=True)
    ]
    return begins[0] + str(numbers), turns, {"numbers": numbers}


PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude")
GIFTS = ("yellow present", "red present", "blue present", "green ball", "pink ball", "orange ball", "purple present")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
OPTIONS = "ABCDEFG"


def many_shot(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """ICL.ManyShot: shots of tracking swaps and of date arithmetic, in BIG-bench's manner, generated. size: shots."""
    tracked = bool(rng.random() < 0.5)
    make = _swaps if tracked else _dates
    shots = [make(rng) for _ in range(size)]
    asked = [make(rng) for _ in range(N_TURNS)]
    turns = [Turn(f"{q}\n", (f"({a})",), "any", MAX_NEW_TOKENS["many_shot"], golden=f"({a})") for q, a in asked]
    context = "\n\n".join(f"{q}\n({a})" for q, a in shots)
    return context, turns, {"kind": "tracking" if tracked else "dates"}


def _swaps(rng: np.random.Generator) -> tuple[str, str]:
    """Seven people swap presents; who holds which at the end?"""
    held = [GIFTS[i] for i in rng.permutation(len(GIFTS))]
    lines = [f"{who} has a {gift}" for who, gift in zip(PEOPLE, held, strict=True)]
    said = ["At the start of the game: " + ", ".join(lines) + "."]
    for _ in range(len(PEOPLE)):
        a, b = (int(i) for i in rng.permutation(len(PEOPLE))[:2])
        held[a], held[b] = held[b], held[a]
        said.append(f"{PEOPLE[a]} and {PEOPLE[b]} swap.")
    who = int(rng.integers(len(PEOPLE)))
    return _with_options(" ".join([*said, f"At the end of the game, {PEOPLE[who]} has the"]), held[who], GIFTS, rng)


def _dates(rng: np.random.Generator) -> tuple[str, str]:
    """A date, some days on or back."""
    today = date(int(rng.integers(1950, 2030)), 1, 1) + timedelta(days=int(rng.integers(365)))
    shift = int(rng.choice([-10, -7, -1, 1, 7, 10]))
    wanted = today + timedelta(days=shift)
    near = [today + timedelta(days=shift + off) for off in (-30, -2, 1, 3, 365)]
    when = f"{abs(shift)} day{'s' if abs(shift) > 1 else ''} {'from now' if shift > 0 else 'ago'}"
    ask = f"Today is {MONTHS[today.month - 1]} {today.day}, {today.year}. What is the date {when} in MM/DD/YYYY?"
    told = [f"{day:%m/%d/}{day.year}" for day in [wanted, *near]]
    return _with_options(ask, told[0], told, rng)


def _with_options(ask: str, right: str, options: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    shuffled = [options[i] for i in rng.permutation(len(options))]
    listed = "\n".join(f"({OPTIONS[i]}) {option}" for i, option in enumerate(shuffled))
    return f"{ask}\nOptions:\n{listed}", OPTIONS[shuffled.index(right)]


# Pairs among the prose of the mixed task, as in the published one.
MOST_PAIRS = 100
WORDS_PER_PAIR = 40


def mixed_pairs(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Mix.RepoQA+KV, the half of the pairs: key-value pairs as lines of a long text. size: words of prose."""
    pairs = [(make_uuid(rng), make_uuid(rng)) for _ in range(MOST_PAIRS)]
    return _among_prose(size, pairs, "mix_kv", rng, essay)


def short_mixed_pairs(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """As `mixed_pairs`, with keys of two words and values of seven digits. size: words of prose."""
    names = Names(rng)
    pairs = [(names.draw("words"), names.draw("numbers")) for _ in range(MOST_PAIRS)]
    return _among_prose(size, pairs, "mix_kv_short", rng, essay)


def _among_prose(
    size: int, pairs: Sequence[tuple[str, str]], task: str, rng: np.random.Generator, essay: facts.Essay
) -> Made:
    n_pairs = min(len(pairs), max(1, size // WORDS_PER_PAIR))
    lines = [json.dumps({key: value}) for key, value in pairs[:n_pairs]]
    context = KV_BEGIN + _scattered(essay.words(size), lines, rng)
    turns = [_kv_turn(context, *pairs[i], task=task) for i in _spread(n_pairs, rng)]
    return context, turns, {"pairs": dict(pairs[:n_pairs])}


def mixed_needles(size: int, rng: np.random.Generator, essay: facts.Essay) -> Made:
    """Mix.Sum+NIAH, the half of the needles: five pass keys in documents. size: words of prose."""
    names = [facts.ADJECTIVES[i] for i in rng.permutation(len(facts.ADJECTIVES))[:N_TURNS]]
    keys = [str(i) for i in rng.permutation(90_000)[:N_TURNS] + 10_000]
    lines = [PASSKEY.format(name=name, key=key) for name, key in zip(names, keys, strict=True)]
    context = PASSKEY_BEGIN + _scattered(essay.words(size), lines, rng)
    turns = [
        Turn(
            PASSKEY_ASK.format(name=name),
            (key,),
            "first_number",
            MAX_NEW_TOKENS["mix_passkey"],
            golden=key,
            depth=context.index(line) / len(context),
            part="passkey",
        )
        for name, key, line in zip(names, keys, lines, strict=True)
    ]
    return context, [turns[i] for i in rng.permutation(len(turns))], {"keys": keys}


def _scattered(prose: str, lines: Sequence[str], rng: np.random.Generator) -> str:
    sentences = facts.split_sentences(prose)
    places = np.sort(rng.integers(0, len(sentences) + 1, len(lines)))
    return inserted_text(sentences, lines, places.tolist())


_MAKERS: dict[str, Callable[[int, np.random.Generator, facts.Essay], Made]] = {
    "kv": key_values,
    "kv_short": short_key_values,
    "prefix_suffix": prefix_suffix,
    "vt": multi_hop,
    "mf": math_find,
    "many_shot": many_shot,
    "mix_kv": mixed_pairs,
    "mix_kv_short": short_mixed_pairs,
    "mix_passkey": mixed_needles,
}
