"""SCBench's generated tasks: each answer is found again by reading the context; prompts are those of the harness."""

import json
import re
from collections import Counter
from datetime import datetime, timedelta
from statistics import median

import pytest
from laws import rarely

from retrieval_attn import load
from retrieval_attn.bench.quality.examples import Prompts, fit
from retrieval_attn.bench.scbench.tasks import TASKS, scbench_maker

UNBOUNDED = 1 << 20
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WHOLE = {
    "kv": 200,
    "kv_short": 200,
    "prefix_suffix": 300,
    "vt": 200,
    "mf": 500,
    "many_shot": 20,
    "mix_kv": 4000,
    "mix_kv_short": 4000,
    "mix_passkey": 2000,
}
PAIRS = ("kv", "kv_short")
BUDGETS = {"kv": 150, "prefix_suffix": 150, "vt": 30, "mf": 5, "many_shot": 10, "mix_kv": 80, "mix_passkey": 15}
SCORERS = {
    "kv": "contains",
    "prefix_suffix": "contains",
    "vt": "all",
    "mf": "number",
    "many_shot": "any",
    "mix_kv": "contains",
    "mix_passkey": "first_number",
}


@pytest.fixture(scope="module")
def prompts():
    return Prompts(load())


def make(task, size=None, n_tokens=8192, sample=0, seed=1, text=None):
    return scbench_maker(task, n_tokens, sample, seed, text)(size or WHOLE[task])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n_tokens", [8192, *rarely(32768)])
def test_prompts_have_the_tokens_asked_for_and_never_more(prompts, task, n_tokens):
    example = fit(scbench_maker(task, n_tokens, 0, 1, None), n_tokens, prompts, UNBOUNDED)
    n = len(prompts.request(prompts.context(example), example, 0))
    # A shot has more than a hundredth of 8K.
    unit = 250 if task == "many_shot" else 0
    assert n_tokens - max(n_tokens // 100, unit) <= n <= n_tokens
    assert len(example.turns) == 5


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_from_their_arguments_alone(task):
    assert make(task) == make(task)
    others = [make(task), make(task, seed=2), make(task, sample=1), make(task, n_tokens=16384)]
    assert len({example.context for example in others}) == 4


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sample", range(3))
def test_turns_about_one_context_differ(task, sample):
    turns = make(task, sample=sample).turns
    assert len(turns) == len({turn.ask for turn in turns}) == 5


@pytest.mark.parametrize("task", TASKS)
def test_budgets_and_scorers_are_the_published_ones(task):
    for turn in make(task).turns:
        assert turn.max_new_tokens == BUDGETS.get(task, 40)
        assert turn.scorer == SCORERS.get(task, "contains")


@pytest.mark.parametrize("task", [*PAIRS, "prefix_suffix", "mix_kv", "mix_passkey"])
def test_depths_told_are_where_the_answers_stand(task):
    example = make(task)
    for turn in example.turns:
        # Within a needle: a pass key stands amid its sentence.
        assert abs(example.context.index(turn.refs[0]) / len(example.context) - turn.depth) < 60 / len(example.context)


@pytest.mark.parametrize("task", [*PAIRS, "prefix_suffix"])
def test_answers_lie_in_all_fifths_of_a_context_in_random_order(task):
    orders = set()
    for sample in range(10):
        example = make(task, sample=sample)
        entries = list(example.facts["pairs"].values()) if task in PAIRS else example.facts["entries"]
        fifths = [5 * entries.index(turn.refs[0]) // len(entries) for turn in example.turns]
        assert sorted(fifths) == [0, 1, 2, 3, 4]
        orders.add(tuple(fifths))
    assert len(orders) > 5


@pytest.mark.parametrize("task", PAIRS)
@pytest.mark.parametrize("size", [1, 3, 200])
def test_looking_a_key_up_gives_its_value(task, size):
    example = make(task, size)
    # Pairs, not a dict: a key that comes twice must show.
    pairs = json.loads(example.context.partition("JSON data:\n")[2], object_pairs_hook=list)
    assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == size
    assert len(example.turns) == min(5, size)
    for turn in example.turns:
        key = re.search('Key: "(.+)"\n', turn.ask)[1]
        assert turn.refs == (turn.golden,) == (dict(pairs)[key],)
        assert example.context.count(turn.refs[0]) == 1
        assert example.context + example.joint + turn.ask == (
            "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
            + json.dumps(dict(pairs))
            + f'\n\n\nKey: "{key}"\nThe value associated with the specified key is: '
        )
    shape = (UUID, UUID) if task == "kv" else (r"[a-z]+-[a-z]+", r"\d{7}")
    assert all(re.fullmatch(one, text) for pair in pairs for one, text in zip(shape, pair, strict=True))


def test_one_string_has_both_prefix_and_suffix():
    example = make("prefix_suffix")
    entries = json.loads(example.context.removeprefix("dict = "))
    assert len(set(entries)) == len(entries) == 300
    assert all(re.fullmatch("[A-Za-z]{20,25}", entry) for entry in entries)
    for turn in example.turns:
        asked = r"Prefix: (\w+); Suffix: (\w+). The word with both prefix and suffix from the dict is"
        prefix, suffix = re.fullmatch(asked, turn.ask).groups()
        assert turn.refs == tuple(one for one in entries if one.startswith(prefix) and one.endswith(suffix))
        assert example.joint == "\n\n"


def test_following_a_chain_finds_its_variables():
    example = make("vt")
    held = {}
    for name, other, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", example.context):
        assert name not in held
        held[name] = held[other] if other else value
    assert len(set(held.values())) == 5
    for turn in example.turns:
        value = re.search(r"the value (\d+) in the text", turn.ask)[1]
        assert sorted(turn.refs) == sorted(name for name in held if held[name] == value)
        # Two hops.
        assert len(turn.refs) == 3
        assert turn.golden == str(list(turn.refs))


RANKS = {
    "largest": -1,
    "second largest": -2,
    "third largest": -3,
    "smallest": 0,
    "second smallest": 1,
    "third smallest": 2,
}


@pytest.mark.parametrize("sample", range(10))
def test_sorting_the_numbers_finds_the_one_asked_for(sample):
    example = make("mf", sample=sample)
    first, numbers = example.context.split("\n\n")
    numbers = json.loads(numbers)
    assert len(numbers) % 2 == 1
    assert 0 <= min(numbers) < 200
    assert 800 <= max(numbers) <= 999
    for i, turn in enumerate(example.turns):
        asked = turn.ask if i else f"{first}\n\n{turn.ask}"
        what = re.search("What is the (.+) number of the list", asked)[1]
        wanted = median(numbers) if what == "median" else sorted(set(numbers))[RANKS[what]]
        assert turn.refs == (str(wanted),)
        assert asked == (
            f"What is the {what} number of the list?\n\n"
            f"You should answer with only one number, no other words. The {what} number of the list is: "
        )


def test_the_first_question_of_numbers_stands_before_them():
    """`{prefix}\\n\\n{context}\\n\\n{input}`: the question was behind the numbers, and named no list."""
    example = make("mf")
    prompt = example.context + example.joint + example.turns[0].ask
    prefix, context, ask = prompt.split("\n\n")
    assert prefix == f"What is {re.findall(r'The .+ is', ask)[0].lower()[:-3]}?"
    assert json.loads(context) == example.facts["numbers"]


def swapped(question):
    """What the one asked about holds at the end."""
    held = dict(re.findall(r"(\w+) has a (\w+ \w+)", question))
    for a, b in re.findall(r"(\w+) and (\w+) swap\.", question):
        held[a], held[b] = held[b], held[a]
    return held[re.search(r"At the end of the game, (\w+) has the", question)[1]]


def dated(question):
    said, n, way = re.search(r"Today is (.+, \d+)\. What is the date (\d+) days? (from now|ago)", question).groups()
    day = datetime.strptime(said, "%B %d, %Y") + timedelta(days=int(n) * (1 if way == "from now" else -1))
    return day.strftime("%m/%d/%Y")


@pytest.mark.parametrize("sample", range(8))
def test_shots_and_turns_are_answered_rightly(sample):
    example = make("many_shot", sample=sample)
    shots = [shot.rpartition("\n") for shot in example.context.split("\n\n")]
    asked = [*((ask, answer) for ask, _, answer in shots), *((turn.ask, turn.refs[0]) for turn in example.turns)]
    assert len(shots) == WHOLE["many_shot"]
    answer = swapped if example.facts["kind"] == "tracking" else dated
    for question, told in asked:
        options = dict(re.findall(r"^(\([A-G]\)) (.+)$", question, re.MULTILINE))
        assert [letter for letter, option in options.items() if option == answer(question)] == [told]
    assert all(turn.golden == turn.refs[0] for turn in example.turns)


def test_shots_are_of_both_kinds_and_all_letters():
    made = [make("many_shot", 30, sample=sample) for sample in range(12)]
    assert {example.facts["kind"] for example in made} == {"tracking", "dates"}
    letters = Counter(re.findall(r"^(\([A-G]\))$", "\n".join(example.context for example in made), re.MULTILINE))
    assert set(letters) == {f"({letter})" for letter in "ABCDEFG"}


@pytest.mark.parametrize(("size", "n_pairs"), [(1, 1), (400, 10), (4000, 100), (8000, 100)])
@pytest.mark.parametrize(("task", "key", "value"), [("mix_kv", UUID, UUID), ("mix_kv_short", "[a-z-]+", r"\d{7}")])
def test_pairs_among_prose_answer_what_is_asked(task, key, value, size, n_pairs):
    example = make(task, size)
    lines = re.findall(rf'(?:^|\s)(\{{"{key}": "{value}"\}})(?=\s|$)', example.context)
    pairs = {key: value for line in lines for key, value in json.loads(line).items()}
    assert len(lines) == len(pairs) == n_pairs
    assert len(example.turns) == min(5, n_pairs)
    for turn in example.turns:
        assert turn.refs == (pairs[re.search('Key: "(.+)"\n', turn.ask)[1]],)
        assert example.context.count(turn.refs[0]) == 1
        assert turn.part == "kv"


@pytest.mark.parametrize("size", [1, 40, 2000])
@pytest.mark.parametrize("sample", range(5))
def test_pass_keys_among_prose_answer_what_is_asked(size, sample):
    example = make("mix_passkey", size, sample=sample)
    said = re.findall(
        r"(?:^|\s)The pass key (\w+) is (\d+)\. Remember it\. \2 is the pass key \1\.(?=\s|$)", example.context
    )
    assert len(said) == len(dict(said)) == len({key for _, key in said}) == 5
    for turn in example.turns:
        name = re.fullmatch(r"What is the pass key (\w+)\? The pass key \1 is", turn.ask)[1]
        assert turn.refs == (dict(said)[name],)
        assert re.fullmatch(r"\d{5}", turn.refs[0])
        assert turn.part == "passkey"
    assert example.context.startswith(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n"
    )


def test_prose_is_the_text_that_was_given():
    text = " ".join(f"Word{i} is here." for i in range(100))
    body = make("mix_passkey", 50, text=text).context.partition("information.\n\n")[2]
    prose = re.sub(r"The pass key (\w+) is \d+\. Remember it\. \d+ is the pass key \1\. ?", "", body)
    assert len(prose.split()) == 50
    assert prose.strip() in " ".join([text] * 2)


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="unknown SCBench task 'kv_hard'; choose from kv, kv_short"):
        scbench_maker("kv_hard", 8192, 0, 1, None)
