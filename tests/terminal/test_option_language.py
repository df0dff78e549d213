"""One language of options: what --set reads, methods of benchmarks read, and /set reads; its words are the fields."""

import dataclasses
import re
from types import NoneType
from typing import Annotated, get_args

import pytest
from option_values import VALUES

from retrieval_attn.config import ALLOWED, RetrievalConfig, Sampling
from retrieval_attn.terminal.option_language import (
    field_docs,
    first_sentence,
    parse_pairs,
    split_pairs,
    unknown,
    what_none_means,
    words_of,
)

WORDS = words_of(RetrievalConfig)


@dataclasses.dataclass
class Kettle:
    """What boils.

    water: this many litres. Not: a field.
        More of it. None: what is there.
    lid: whether it is on; 1.5 times as fast (see tea.py).
    spout: None: no spout.

    Raises: nothing.
    """

    water: int | None = None
    lid: bool = True
    spout: Annotated[int, "bytes"] | None = None
    bare: str = "x"


def test_entries_are_read_from_a_docstring():
    docs = field_docs(Kettle)
    assert docs["water"] == "this many litres. Not: a field. More of it. None: what is there."
    assert docs["lid"] == "whether it is on; 1.5 times as fast (see tea.py)."
    assert set(docs) == {"water", "lid", "spout"}


def test_a_first_sentence_stands_by_itself():
    assert first_sentence("this many litres. Not more.") == "This many litres."
    assert first_sentence("1.5 times as fast (see tea.py). Or not.") == "1.5 times as fast (see tea.py)."
    assert first_sentence("") == ""


def test_what_none_means():
    assert what_none_means("this many. None: what is there. More.") == "what is there"
    assert what_none_means("this many. Not None: never.") == ""


def test_a_word_knows_its_field():
    water, lid, spout, bare = words_of(Kettle).values()
    assert (water.kind, water.unset, water.default) == ("int", "what is there", None)
    assert (lid.kind, lid.unset, lid.sentence) == ("bool", "", "Whether it is on; 1.5 times as fast (see tea.py).")
    assert (spout.kind, spout.unset) == ("bytes", "no spout")
    assert (bare.kind, bare.sentence) == ("str", "")


@pytest.mark.parametrize("options", [RetrievalConfig, Sampling])
def test_every_field_is_documented_so_that_its_first_sentence_helps(options):
    hints = {field.name: field.type for field in dataclasses.fields(options)}
    assert list(field_docs(options)) == list(hints)
    for word in words_of(options).values():
        assert re.fullmatch(r"[A-Z].{10,120}\.", word.sentence), word
        assert bool(word.unset) == (NoneType in get_args(hints[word.field])), f"{word.field} must say what None means"


def test_names_that_are_one_of_a_few_are_fields():
    assert set(ALLOWED) <= {field.name for field in dataclasses.fields(RetrievalConfig)}
    assert WORDS["index"].allowed == ALLOWED["index"]


def test_sampling_has_its_own_word_where_retrieval_has_one():
    both = set(WORDS) & set(words_of(Sampling))
    assert both == {"seed"}
    assert words_of(Sampling)["sample_top_k"].field == "top_k"


def test_the_values_here_are_those_of_all_fields():
    assert list(VALUES) == list(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_every_field_can_be_said(name):
    text, value = VALUES[name]
    said = parse_pairs([f"{name}={text}"], WORDS, "--set")
    assert said == {name: value}
    assert type(said[name]) is type(value)
    assert getattr(RetrievalConfig(**said), name) == value != WORDS[name].default


@pytest.mark.parametrize("name", WORDS)
def test_none_is_said_where_it_is_a_value(name):
    if WORDS[name].default is None:
        assert parse_pairs([f"{name}=None"], WORDS, "--set") == {name: None}
    elif name != "prefill":
        with pytest.raises(ValueError, match=f"^{name} must be .*'none'"):
            parse_pairs([f"{name}=none"], WORDS, "--set")


def test_pairs_are_parted_by_commas_that_are_borders():
    assert split_pairs(["index=scan,top_k=200", " seed=1, threads=2"]) == [
        "index=scan",
        "top_k=200",
        "seed=1",
        "threads=2",
    ]
    assert split_pairs(["kv_dir=/a,b,top_k=2"]) == ["kv_dir=/a,b", "top_k=2"]


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("topk=3", "--set: unknown option 'topk'; did you mean top_k? There are index, top_k, n_sink"),
        ("zzzzzz=3", "--set: unknown option 'zzzzzz'; there are index, top_k"),
        ("", "--set: unknown option ''; there are index"),
        ("top_k", "--set: top_k needs a value, as in top_k=100"),
        ("top_k=x", "top_k must be a whole number such as 100, got 'x'"),
        ("top_k=1.5", "top_k must be a whole number such as 100, got '1.5'"),
        ("n_local=8q", "n_local must be tokens such as 8k, 1m or 5000, got '8q'"),
        ("max_host_bytes=lots", "max_host_bytes must be bytes such as 24g, 1.5g or 800m, got 'lots'"),
        ("mass=much", "mass must be a number such as 0.98, got 'much'"),
        ("share_group=maybe", "share_group must be true or false, got 'maybe'"),
        ("index=grph", "'scan', 'page', 'auto', got 'grph'; did you mean graph?"),
    ],
)
def test_what_cannot_be_is_one_line(pair, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parse_pairs([pair], WORDS, "--set")
    assert "\n" not in str(error.value)


def test_one_name_has_one_value():
    assert parse_pairs(["top_k=1k", "top_k=1024"], WORDS, "--set") == {"top_k": 1024}
    with pytest.raises(ValueError, match="--set: top_k is given twice, as 1 and as 2"):
        parse_pairs(["top_k=1", "top_k=2"], WORDS, "--set")


def test_unknown_names_are_answered_with_the_nearest_and_the_list():
    assert unknown("task", "cow", ["cows", "pig"]) == "unknown task 'cow'; did you mean cows? There are cows, pig"
    assert unknown("task", "zebra", ["cows", "pig"]) == "unknown task 'zebra'; there are cows, pig"
