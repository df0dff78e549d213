"""A needle in a haystack: once, where it was asked for, with MInference's words around it."""

import re

import numpy as np
import pytest

from retrieval_attn import load
from retrieval_attn.bench.needle.tasks import needle_maker
from retrieval_attn.bench.quality.examples import Prompts, fit
from retrieval_attn.bench.shared.facts import split_sentences

DEPTHS = [0.0, 0.25, 1 / 3, 0.5, 0.9, 1.0]

PUBLISHED = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n{context}\n\nQuestion: {question} Don't give information outside the document or repeat your "
    "findings. Keep your response short and direct. Answer: "
)


@pytest.fixture(scope="module")
def prompts():
    return Prompts(load())


def make(size=500, depth=0.5, n_tokens=8192, sample=0, seed=1, text=None, plain=False):
    return needle_maker(n_tokens, [depth], sample, seed, text, plain)(size)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n_tokens", [8192, 32768])
@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
def test_prompts_have_the_tokens_asked_for_and_never_more(prompts, plain, n_tokens, depth):
    example = fit(needle_maker(n_tokens, [depth], 0, 1, None, plain), n_tokens, prompts, 1 << 20)
    assert 0.99 * n_tokens <= len(prompts.request(prompts.context(example), example, 0)) <= n_tokens
    assert example.turns[0].depth == depth


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("size", [1, 7, 2000])
def test_the_needle_stands_once_at_its_depth(plain, depth, size):
    example = make(size, depth, plain=plain)
    before, after = example.context.split(example.facts["needles"][0])
    before = before if plain else before.partition("irrelevant).\n")[2]
    heads, tails = (len(split_sentences(side.strip())) for side in (before, after.removeprefix(".")))
    assert abs(heads - depth * (heads + tails)) <= 1
    # It does not stick to the words around it.
    assert not before or before[-1].isspace()
    assert re.match(r"\.( |$)" if plain else r"\n|$", after)


@pytest.mark.parametrize("plain", [False, True])
def test_the_number_is_that_of_the_city_asked_about(plain):
    example = make(plain=plain)
    (turn,) = example.turns
    city, number = re.fullmatch(r"The special magic (\w+) number is: (\d{7})", example.facts["needles"][0]).groups()
    assert example.context.count(number) == 1
    assert turn.refs == (turn.golden,) == (number,)
    assert f"What is the special magic {city} number?" in turn.ask
    assert (turn.scorer, turn.max_new_tokens) == ("contains", 32)


def test_the_prompt_is_the_published_one():
    example = make()
    haystack = example.context.partition("irrelevant).\n")[2]
    city = re.search("magic (.+) number", example.facts["needles"][0])[1]
    asked = PUBLISHED.format(context=haystack, question=f"What is the special magic {city} number?")
    assert example.context + example.joint + example.turns[0].ask == asked
    assert haystack.count(f"\n{example.facts['needles'][0]}\n") == 1


def test_examples_follow_from_their_arguments_alone():
    assert make() == make()
    others = [make(), make(seed=2), make(sample=1), make(n_tokens=16384), make(depth=0.25)]
    assert len({example.facts["needles"][0] for example in others}) == 5
    # Of one run: seeds are not told apart.
    assert len({example.id for example in others}) == 4


def test_the_haystack_is_the_text_that_was_given():
    text = " ".join(f"Word{i} is here." for i in range(100))
    example = make(250, text=text)
    words = example.context.partition("irrelevant).\n")[2].replace(example.facts["needles"][0], "").split()
    assert len(words) == 250
    assert " ".join(words) in " ".join([text] * 3)


@pytest.mark.parametrize("plain", [False, True])
def test_needles_of_all_depths_in_one_text(plain):
    depths = [i / 9 for i in range(10)]
    example = needle_maker(8192, depths, 0, 1, None, plain)(3000)
    needles = example.facts["needles"]
    assert [example.context.count(needle) for needle in needles] == [1] * 10
    places = [example.context.index(needle) / len(example.context) for needle in needles]
    assert places == sorted(places)
    assert np.abs(np.array(places) - depths).max() < 0.03
    assert len({turn.refs for turn in example.turns}) == len({turn.ask for turn in example.turns}) == 10
    for turn, needle, depth in zip(example.turns, needles, depths, strict=True):
        assert turn.refs[0] in needle
        assert re.search("magic (.+) number", needle)[1] in turn.ask
        assert turn.depth == depth


def test_more_depths_than_cities_are_refused():
    with pytest.raises(ValueError, match="at most"):
        needle_maker(8192, [0.5] * 500, 0, 1, None)
