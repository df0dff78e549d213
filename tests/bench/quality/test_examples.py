"""Examples as token ids, and examples of a size asked for."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from retrieval_attn import load
from retrieval_attn.bench.needle.tasks import needle_maker
from retrieval_attn.bench.quality.examples import Example, Prompts, Turn, fit, rng_of
from retrieval_attn.bench.ruler.tasks import TASKS as RULER
from retrieval_attn.bench.ruler.tasks import ruler_maker
from retrieval_attn.bench.scbench.tasks import TASKS as SCBENCH
from retrieval_attn.bench.scbench.tasks import scbench_maker

UNBOUNDED = 1 << 20


@pytest.fixture(scope="module")
def llm():
    return load()


@pytest.fixture(scope="module")
def bare(llm):
    """The same model without a chat template."""
    bare = copy.copy(llm)
    bare.tokenizer = copy.deepcopy(llm.tokenizer)
    bare.tokenizer.chat_template = None
    return bare


@pytest.fixture(scope="module")
def prompts(llm):
    return Prompts(llm)


def examples():
    """One of each task."""
    made = [ruler_maker(task, 2048, 0, 1, None)(30) for task in RULER]
    made += [scbench_maker(task, 2048, 0, 1, None)(30) for task in SCBENCH]
    return [*made, needle_maker(2048, [0.5], 0, 1, None)(300)]


def lines(n_turns=2, per_turn=1):
    """A maker: size lines of eight tokens or so, and n_turns questions; fewer of both where there are fewer lines."""

    def make(size):
        turns = [Turn(f"\nWhat is line {i}?", (str(i),), "any", 10, golden=f"It is {i}") for i in range(n_turns)]
        return Example("lines", str(size), "\n".join(["The sky is blue."] * size), tuple(turns[: per_turn * size]))

    return make


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.task)
def test_requests_begin_with_the_ids_of_the_context(prompts, llm, example):
    context = prompts.context(example)
    before = list(context)
    for number, turn in enumerate(example.turns):
        request = prompts.request(context, example, number)
        assert request[: len(context)] == context == before
        said = llm.tokenizer.decode(request)
        assert said == f"<|user|>{example.context}{example.joint}{turn.ask}<|end|><|assistant|>{turn.prefix}"
    assert prompts.count(example) == len(prompts.request(context, example, 0))


# The template cuts the blank at the end of what a user says, which some questions have.
TRIMMED = ("kv", "kv_short", "mf", "many_shot", "mix_kv", "mix_kv_short", "needle")


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.task)
def test_prompts_are_what_the_chat_template_makes_of_the_messages(prompts, llm, example):
    turns = [replace(turn, ask=turn.ask.rstrip(), prefix="") for turn in example.turns]
    assert (turns[0].ask != example.turns[0].ask) == (example.task in TRIMMED)
    example = replace(example, turns=tuple(turns))
    first = {"role": "user", "content": example.context + example.joint + turns[0].ask}
    asked = prompts.request(prompts.context(example), example, 0)
    assert asked == llm.encode([first])
    if len(turns) > 1:
        messages = [first, {"role": "assistant", "content": turns[0].golden}]
        messages.append({"role": "user", "content": turns[1].ask.lstrip()})
        example = replace(example, turns=(turns[0], replace(turns[1], ask=turns[1].ask.lstrip())))
        assert prompts.follow_up(asked, example, 1) == llm.encode(messages)


def test_follow_ups_hold_the_golden_answers_between_the_turns(prompts, llm):
    example = scbench_maker("kv", 2048, 0, 1, None)(30)
    asked = prompts.request(prompts.context(example), example, 0)
    for number in range(1, 5):
        longer = prompts.follow_up(asked, example, number)
        assert longer[: len(asked)] == asked
        golden, ask = example.turns[number - 1].golden, example.turns[number].ask
        assert llm.tokenizer.decode(longer[len(asked) :]) == f" {golden}<|end|><|user|>{ask}<|end|><|assistant|>"
        asked = longer


def test_without_a_chat_template_texts_follow_one_another(bare):
    prompts, example = Prompts(bare), scbench_maker("kv", 2048, 0, 1, None)(30)
    first, second = example.turns[:2]
    context = prompts.context(example)
    assert context == bare.encode(example.context)
    asked = prompts.request(context, example, 0)
    assert bare.tokenizer.decode(asked) == example.context + "\n\n" + first.ask
    added = prompts.follow_up(asked, example, 1)[len(asked) :]
    assert bare.tokenizer.decode(added) == f"{first.golden}\n\n{second.ask}"


def test_without_a_chat_template_a_text_begins_as_the_tokenizer_begins_texts(bare, monkeypatch):
    """Of <bos> there is one, before the context."""
    bos = bare.tokenizer.pad_token_id
    encode = type(bare.tokenizer).__call__

    def with_bos(self, text, add_special_tokens=True, **options):
        ids = encode(self, text, add_special_tokens=False, **options)["input_ids"]
        return {"input_ids": [bos, *ids] if add_special_tokens else ids}

    monkeypatch.setattr(type(bare.tokenizer), "__call__", with_bos)
    prompts, example = Prompts(bare), lines()(3)
    asked = prompts.follow_up(prompts.request(prompts.context(example), example, 0), example, 1)
    assert [i for i, token in enumerate(asked) if token == bos] == [0]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.task)
@pytest.mark.parametrize("template", [True, False])
def test_room_is_enough_for_all_turns(llm, bare, template, example):
    prompts = Prompts(llm if template else bare)
    context = prompts.context(example)
    most = prompts.count(example) + prompts.room(example)
    asked = prompts.request(context, example, 0)
    for number, turn in enumerate(example.turns):
        asked = prompts.follow_up(asked, example, number) if number else asked
        assert len(asked) + turn.max_new_tokens <= most
        assert len(prompts.request(context, example, number)) + turn.max_new_tokens <= most


@pytest.mark.parametrize("n_tokens", [300, 1000, 5000])
def test_the_largest_that_fits_is_found(prompts, n_tokens):
    make = lines()
    found = fit(make, n_tokens, prompts, UNBOUNDED)
    assert prompts.count(found) <= n_tokens < prompts.count(make(int(found.id) + 1))


@pytest.mark.parametrize("over", [0, 300])
def test_turns_come_on_top_unless_the_model_ends_there(prompts, over):
    make = lines()
    room = prompts.room(make(2))
    n_tokens = 10_000
    longest = n_tokens + (room if over else room - 90)
    found = fit(make, n_tokens, prompts, longest)
    if over:
        assert found == fit(make, n_tokens, prompts, UNBOUNDED)
    else:
        assert prompts.count(found) < n_tokens - 80
    assert 0.98 * n_tokens < prompts.count(found) <= longest - room


def test_room_is_left_for_turns_that_only_large_examples_have(prompts):
    """One pair has one turn, many have five: room was left for one."""
    make, n_tokens = scbench_maker("kv_short", 20_000, 0, 1, None), 20_000
    longest = n_tokens + prompts.room(make(1)) + 20
    found = fit(make, n_tokens, prompts, longest)
    assert len(make(1).turns) == 1
    assert len(found.turns) == 5
    assert prompts.count(found) + prompts.room(found) <= longest
    assert prompts.count(found) > 0.98 * n_tokens


def test_a_model_that_is_too_short_is_told_with_both_numbers(prompts):
    room = prompts.room(lines(1)(1))
    said = rf"a context of 8192 tokens and {room} more for the turns of lines are longer than the model's 8000"
    with pytest.raises(ValueError, match=said):
        fit(lines(1), 8192, prompts, 8000)
    with pytest.raises(ValueError, match="longer than the model's 2000; ask for fewer"):
        fit(scbench_maker("kv", 2048, 0, 1, None), 2048, prompts, 2000)


def test_fewer_tokens_than_the_smallest_example_are_told(prompts):
    least = prompts.count(lines()(1))
    with pytest.raises(ValueError, match=f"lines needs at least {least} tokens, got 10; ask for a longer context"):
        fit(lines(), 10, prompts, UNBOUNDED)
    assert prompts.count(fit(lines(), least, prompts, UNBOUNDED)) == least


def limited(n_lines):
    """A maker whose text ends."""
    make = lines()
    return lambda size: make(min(size, n_lines))


@pytest.mark.parametrize("n_tokens", [3000, 100_000])
def test_a_text_that_ends_too_early_is_told(prompts, n_tokens):
    """The search went on for ever."""
    tokens = prompts.count(lines()(200))
    with pytest.raises(ValueError, match=f"lines has text for {tokens} tokens only, got {n_tokens}; ask for a shorter"):
        fit(limited(200), n_tokens, prompts, UNBOUNDED)


@pytest.mark.parametrize("missing", [0, 1, 9])
def test_a_text_that_just_suffices_is_taken(prompts, missing):
    tokens = prompts.count(lines()(200))
    assert tokens > 900
    assert prompts.count(fit(limited(200), tokens + missing, prompts, UNBOUNDED)) == tokens


@pytest.mark.parametrize("steps", [2, 40])
def test_sizes_that_add_nothing_are_passed_over(prompts, steps):
    """Counts of words are rounded: two sizes may make one text."""
    make = lines()
    found = fit(lambda size: make(1 + size // steps), 3000, prompts, UNBOUNDED)
    assert 0.99 * 3000 <= prompts.count(found) <= 3000


def test_generators_are_named_by_their_words():
    # Zeros at the end and the beginnings of long names made no difference.
    named = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 0), (1, "niah_multikey_2"), (1, "other_multikey_2")]
    draws = {tuple(rng_of(*words).integers(1 << 30, size=4)) for words in named}
    assert len(draws) == len(named)
    assert np.array_equal(rng_of(1, "a").integers(99, size=9), rng_of(1, "a").integers(99, size=9))
    # The same on every machine, for ever: published scores hang on it.
    assert rng_of(1, "kv", 8192).integers(1 << 30, size=3).tolist() == [390439886, 242088085, 1000018515]
