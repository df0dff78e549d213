"""RULER's tasks: what a generator promises, checked by reading its text and answering anew."""

import re
from collections import Counter

import numpy as np
import pytest
from laws import rarely

from retrieval_attn import load
from retrieval_attn.bench.quality.examples import Prompts, fit
from retrieval_attn.bench.ruler import tasks as ruler_tasks
from retrieval_attn.bench.ruler.tasks import DEPTHS, NIAH, NOISE, TASKS, Names, ruler_maker
from retrieval_attn.bench.shared.facts import split_sentences

UNBOUNDED = 1 << 20

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")

NIAH_MANY = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?"
)
NIAH_ONE = (
    "A special magic {type_needle_v} is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {type_needle_v} afterwards.\n{context}\nWhat is the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the "
    "value {query}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


@pytest.fixture(scope="module")
def llm():
    return load()


@pytest.fixture(scope="module")
def prompts(llm):
    return Prompts(llm)


def make(task, size=300, n_tokens=8192, sample=0, seed=1, text=None):
    return ruler_maker(task, n_tokens, sample, seed, text)(size)


def asked(example):
    """The words of the prompt, and the one turn."""
    (turn,) = example.turns
    return example.context + example.joint + turn.ask, turn


def haystack(example):
    return example.context.partition("afterwards.\n")[2]


def keys_asked(turn):
    listed = re.search(r" for (.+) mentioned", turn.ask)[1]
    return re.split(", and |, ", listed)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n_tokens", [8192, *rarely(32768)])
def test_prompts_have_the_tokens_asked_for_and_never_more(prompts, task, n_tokens):
    example = fit(ruler_maker(task, n_tokens, 0, 1, None), n_tokens, prompts, UNBOUNDED)
    assert 0.99 * n_tokens <= len(prompts.request(prompts.context(example), example, 0)) <= n_tokens


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_from_their_arguments_alone(task):
    assert make(task) == make(task)
    others = [make(task, seed=2), make(task, sample=1), make(task, n_tokens=16384)]
    texts = {example.context for example in [make(task), *others]}
    assert len(texts) == 4
    assert make(task).id != make(task, sample=1).id


@pytest.mark.parametrize("task", NIAH)
def test_a_needle_is_there_exactly_once(task):
    example, kind = make(task), NIAH[task]
    needles = example.facts["needles"]
    assert len(needles) == len(set(needles)) == max(kind.n_keys, kind.n_queries) * kind.n_values
    assert [example.context.count(needle) for needle in needles] == [1] * len(needles)
    assert [example.context.count(ref) for ref in example.turns[0].refs] == [1] * len(example.turns[0].refs)
    # Blank or line break on both sides, wherever a needle stands.
    for needle in needles:
        before, after = example.context.split(needle)
        assert before[-1].isspace()
        assert not after or after[0].isspace()


@pytest.mark.parametrize("sample", range(60))
def test_a_needle_behind_the_last_word_does_not_stick_to_it(sample):
    """Prose that ends amid a sentence ends without a blank; a needle at depth 1 was glued to its last word."""
    example = make("niah_multivalue", size=50, sample=sample)
    assert len(re.findall(r"(?:^|\s)One of the special magic", haystack(example))) == 4


@pytest.mark.parametrize("task", NIAH)
@pytest.mark.parametrize("size", [1, 300])
def test_needles_answer_what_is_asked(task, size):
    example, kind = make(task, size), NIAH[task]
    found = NEEDLE.findall(example.context)
    told = {key: [value for _, other, value in found if other == key] for _, key, _ in found}
    turn = example.turns[0]
    assert {name for name, _, _ in found} == {kind.values}
    assert len(keys_asked(turn)) == kind.n_queries
    assert sorted(turn.refs) == sorted(value for key in keys_asked(turn) for value in told[key])
    assert len(turn.refs) == kind.n_queries * kind.n_values
    # Keys differ, and so do values: no other answer is right.
    assert all(len(values) == kind.n_values for values in told.values())
    values = [value for _, _, value in found]
    assert len(values) == len(set(values))
    n_straw = size if kind.haystack == "needle" else 0
    assert len(told) == max(kind.n_keys, kind.n_queries) + n_straw


@pytest.mark.parametrize("task", NIAH)
def test_keys_and_values_are_of_their_kind(task):
    shapes = {
        "words": r"[a-z]+-[a-z]+",
        "numbers": r"\d{7}",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    for _, key, value in NEEDLE.findall(make(task).context):
        assert re.fullmatch(shapes[NIAH[task].keys], key)
        assert re.fullmatch(shapes[NIAH[task].values], value)


@pytest.mark.parametrize("task", [task for task, kind in NIAH.items() if kind.haystack == "essay"])
@pytest.mark.parametrize("sample", range(5))
def test_needles_in_an_essay_stand_at_published_depths(task, sample):
    example = make(task, 2000, sample=sample)
    text, before = haystack(example), []
    for needle in sorted(example.facts["needles"], key=text.index):
        head, tail = text.split(needle)
        before.append(len(split_sentences(head)))
        text = head + tail.removeprefix(" ")
    n = len(split_sentences(text))
    places = sorted({int(depth * n) for depth in DEPTHS})
    assert set(before) <= set(places)
    assert len(DEPTHS) == 40
    assert (DEPTHS[0], DEPTHS[-1]) == (0, 1)
    # Forty different depths: no two needles share one.
    assert len(set(before)) == len(before)


@pytest.mark.parametrize("task", [task for task, kind in NIAH.items() if kind.haystack != "essay"])
def test_needles_among_lines_stand_anywhere(task):
    at = []
    for sample in range(200):
        example = make(task, 100, sample=sample)
        lines = haystack(example).split("\n")
        assert len(lines) == 101
        at.append(lines.index(example.facts["needles"][0]))
    # Of forty depths there would be forty places at most.
    assert len(set(at)) > 60
    assert np.histogram(at, 4, (0, 101))[0].min() > 25


@pytest.mark.parametrize("task", NIAH)
def test_the_depth_told_is_where_the_answer_stands(task):
    example = make(task)
    turn, text = example.turns[0], haystack(example)
    if len(turn.refs) > 1:
        assert turn.depth is None
    else:
        assert turn.depth == pytest.approx(text.index(turn.refs[0]) / len(text))


def test_noise_is_nothing_but_noise():
    example = make("niah_single_1")
    assert set(haystack(example).split("\n")) - {NOISE} == set(example.facts["needles"])


def test_an_essay_is_the_text_that_was_given_and_again_its_start():
    text = " ".join(f"Word{i} is here." for i in range(100))
    example = make("niah_single_2", 700, text=text)
    words = haystack(example).replace(example.facts["needles"][0] + " ", "").split()
    assert len(words) == 700
    assert " ".join(words) in " ".join([text] * 5)


@pytest.mark.parametrize("task", NIAH)
def test_needle_prompts_are_the_published_ones(task):
    example, kind = make(task), NIAH[task]
    text, turn = asked(example)
    keys = keys_asked(turn)
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    one = len(turn.refs) == 1
    name = kind.values[:-1] if one else kind.values
    published = NIAH_ONE if one else NIAH_MANY
    assert text == published.format(type_needle_v=name, context=haystack(example), query=query)
    be = "is" if one else "are"
    assert turn.prefix == f" The special magic {name} for {query} mentioned in the provided text {be}"
    assert (turn.scorer, turn.max_new_tokens) == ("all", 128)
    assert (
        ruler_tasks.NEEDLE.format(kind="numbers", key="k", value="v") == "One of the special magic numbers for k is: v."
    )


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_names_are_never_drawn_twice(kind):
    names = Names(np.random.default_rng(0))
    # There are 15,080 pairs of words.
    drawn = [names.draw(kind) for _ in range(20_000)]
    assert len(set(drawn)) == len(drawn)


def follow(text):
    """Values of variables, from assignments in the order of the text."""
    held = {}
    for name, value, other in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", text):
        held[name] = held[value] if value else other
    return held


@pytest.mark.parametrize("size", [1, 300])
def test_following_the_chain_finds_its_variables(size):
    example = make("vt", size)
    text, turn = asked(example)
    _, worked, own = example.context.split("Memorize and track")
    value = re.search(r"the value (\d+)", turn.ask)[1]
    held = follow(own)
    assert sorted(turn.refs) == sorted(name for name in held if held[name] == value)
    assert len(set(turn.refs)) == len(held) == 5
    assert 10000 <= int(value) <= 99999
    assert all(re.fullmatch("[A-Z]{5}", name) for name in held)
    # Each line of the text is noise or an assignment, one to a line.
    lines = own.partition("\n\n")[2].split("\n")
    assert Counter(line == NOISE for line in lines) == {True: size, False: 5}
    told = worked.rpartition("they are: ")[2].split()
    assert follow(worked) == dict.fromkeys(told, "12345")
    assert all(re.fullmatch("[A-Z]{3}", name) for name in told)
    begin = text.rindex("Memorize and track")
    assert text[begin:] == VT[0].format(context="\n".join(lines), query=value)
    assert turn.prefix == VT[1].format(num_v=5, query=value)
    assert VT[1].format(num_v=5, query="12345") in worked
    assert (turn.scorer, turn.max_new_tokens) == ("all", 30)


def test_the_worked_example_of_a_chain_is_short(llm):
    context = make("vt").context
    assert len(llm.encode_text(context[: context.rindex("Memorize and track")])) <= 500


def listed_words(text):
    """The words of a numbered list, which must be numbered from 1 on."""
    numbered = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return Counter(word for _, word in numbered)


@pytest.mark.parametrize(("n_tokens", "often", "seldom"), [(8192, 30, 3), (4096, 30, 3), (4095, 6, 1)])
def test_counting_finds_the_common_words(n_tokens, often, seldom):
    example = make("cwe", 50, n_tokens)
    text, turn = asked(example)
    _, worked, own = example.context.split("Below is a numbered list")
    counts = listed_words(own)
    assert set(turn.refs) == {word for word, _ in counts.most_common(10)}
    assert Counter(counts.values()) == {often: 10, seldom: 50}
    assert text.endswith(CWE[0].format(context=own.partition("\n")[2]))
    assert turn.prefix == CWE[1]
    assert (turn.scorer, turn.max_new_tokens) == ("all", 120)
    shown, _, told = worked.partition(CWE[1])
    shown_counts, n_shown = listed_words(shown.partition("Question")[0]), 20 if seldom == 1 else 40
    assert set(listed_words(told)) == {word for word, _ in shown_counts.most_common(10)}
    assert Counter(shown_counts.values()) == {often // (2 if seldom == 1 else 3): 10, seldom: n_shown - 10}


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_counting_finds_the_frequent_words(size):
    example = make("fwe", size)
    text, turn = asked(example)
    coded = text.partition("coded words. ")[2].partition("\n")[0]
    ranked = Counter(coded.split()).most_common()
    assert ranked[0][0] == "..."
    assert {word for word, _ in ranked[1:4]} == set(turn.refs)
    assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert text == FWE[0].format(context=coded)
    assert turn.prefix == FWE[1]
    assert (turn.scorer, turn.max_new_tokens) == ("all", 50)


def test_frequencies_fall_with_the_square_of_the_rank():
    ranked = Counter(make("fwe", 10_000).context.split("coded words. ")[1].split()).most_common()
    zeta = sum(rank**-2.0 for rank in range(1, 100_000))
    # The vocabulary has a fiftieth of the tokens; who comes less than once does not come.
    wanted = [int(10_000 * rank**-2 / zeta) for rank in range(1, 8192 // 50 + 1)]
    assert np.abs(np.array([n for _, n in ranked]) - [n for n in wanted if n]).max() <= 1


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="unknown RULER task 'niah'; choose from niah_single_1"):
        ruler_maker("niah", 8192, 0, 1, None)
