"""A command asks for dataclasses and gets them, made from options, from --set, or from both."""

import dataclasses
import re
from typing import Annotated

import pytest
import typer
from option_values import VALUES
from typer.testing import CliRunner

from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.terminal.option_language import words_of
from retrieval_attn.terminal.options import Fields, ModelOptions, flag_of, help_of, option, with_options

NAMES = [field.name for field in dataclasses.fields(RetrievalConfig)]


def app_of(command):
    app = typer.Typer(add_completion=False)
    app.command()(with_options(command))
    return app


def call(command, *words):
    return CliRunner().invoke(app_of(command), list(words), catch_exceptions=False)


def made(*words, config=RetrievalConfig, sampling=Sampling):
    """The config and the sampling that a command with these parameters is given."""
    seen = []

    def command(config: config, sampling: sampling, model: ModelOptions, plain: int = 3):
        seen.append((config, sampling, model, plain))

    call(command, *words)
    return seen[0]


def flag(name, text):
    if isinstance(VALUES[name][1], bool):
        return [f"--no-{name.replace('_', '-')}"]
    return [flag_of(name), text]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_config_has_an_option_that_reaches_it(name):
    text, value = VALUES[name]
    expected = RetrievalConfig(**{name: value})
    assert made(*flag(name, text))[0] == expected
    assert made("--set", f"{name}={text}")[0] == expected
    assert made(*flag(name, text), "--set", f"{name}={text}")[0] == expected


def test_nothing_said_is_the_default():
    assert made() == (RetrievalConfig(), Sampling(), ModelOptions(), 3)


def test_a_switch_can_be_on():
    assert made("--share-group")[0].share_group is True
    assert made("--no-share-group", "--set", "top_k=7")[0] == RetrievalConfig(share_group=False, top_k=7)


def test_options_of_answers():
    words = (
        "-n",
        "1k",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--sample-top-k",
        "40",
        "--top-k",
        "9",
        "--seed",
        "5",
    )
    config, sampling, *_ = made(*words)
    assert sampling == Sampling(max_new_tokens=1024, temperature=0.5, top_p=0.9, top_k=40, seed=5)
    assert config == RetrievalConfig(top_k=9, seed=5)
    assert made("--set", "sample_top_k=40,top_k=9,max_new_tokens=1k,temperature=0.5,top_p=0.9,seed=5")[:2] == (
        config,
        sampling,
    )


def test_the_model_and_the_commands_own():
    assert made("-m", "x", "--dtype", "float32", "--plain", "4")[2:] == (ModelOptions(model="x", dtype="float32"), 4)


def test_a_command_may_ask_for_some_fields_and_other_defaults():
    some = Annotated[RetrievalConfig, Fields("top_k", "seed", top_k=7)]
    assert made(config=some)[0] == RetrievalConfig(top_k=7)
    assert made("--top-k", "100", "--set", "n_local=64", config=some)[0] == RetrievalConfig(n_local=64)

    def command(config: some, sampling: Annotated[Sampling, Fields(max_new_tokens=512)]):
        pass

    text = call(command, "--help").output
    assert "--top-k" in text
    assert "--n-local" not in text
    assert "Default: 7." in text
    assert "Default: 512." in text


def test_the_rest_may_be_out_of_reach():
    def command(config: Annotated[RetrievalConfig, Fields("threads", rest=False)]):
        pass

    assert "--set" not in call(command, "--help").output


def test_a_name_that_the_command_takes_itself_is_no_word():
    def command(config: Annotated[RetrievalConfig, Fields("top_k")], index: str = "all"):
        assert (config, index) == (RetrievalConfig(top_k=4), "mine")

    call(command, "--index", "mine", "--set", "top_k=4")
    with pytest.raises(ValueError, match="--set: unknown option 'index'"):
        call(command, "--set", "index=scan")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--top-k", "9", "--set", "top_k=5"], "--top-k and --set top_k=... contradict each other (9 and 5); give one"),
        (["--no-share-group", "--set", "share_group=true"], "--share-group and --set share_group=... contradict"),
        (["--set", "top_k=5", "--set", "top_k=6"], "--set: top_k is given twice, as 5 and as 6"),
        (["--set", "topk=5"], "--set: unknown option 'topk'; did you mean top_k"),
        (["--top-k", "x"], "top_k must be a whole number such as 100, got 'x'"),
        (["--top-k", "0"], "top_k must be an integer of at least 1, got 0"),
        (["--sample-top-k", "-1"], "sample_top_k must be 0 (off) or positive, got -1"),
        (["--n-local", "none"], "n_local must be tokens such as 8k, 1m or 5000, got 'none'"),
    ],
)
def test_what_cannot_be_is_one_line(words, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        made(*words)
    assert "\n" not in str(error.value)


def test_the_help_of_an_option_is_the_first_sentence_and_the_default():
    def command(config: RetrievalConfig, sampling: Sampling):
        """Do it.

        In two lines, of which
        one is broken.
        """

    text = " ".join(CliRunner().invoke(app_of(command), ["--help"], env={"COLUMNS": "400"}).output.split())
    assert "In two lines, of which one is broken." in text
    for word in [*words_of(RetrievalConfig).values(), *words_of(Sampling).values()]:
        assert word.sentence.removesuffix(".") in help_of(word)
        if word.name != "seed":
            default = word.unset or (f"{word.default:g}" if word.kind == "float" else word.default)
            expected = f"{help_of(word)} Default: {'--share-group' if word.kind == 'bool' else default}."
            assert expected in text, expected
    assert "and what a benchmark draws. This seed makes draws repeatable. Default: 0." in text
    assert help_of(words_of(RetrievalConfig)["kv_dtype"]).endswith("in half the memory: auto or int8.")


def test_dataclasses_that_share_an_option_agree_on_its_default():
    def command(config: RetrievalConfig, sampling: Annotated[Sampling, Fields(seed=7)]):
        """Do it."""

    with pytest.raises(ValueError, match="seed has two defaults in one command, '0' and '7'"):
        with_options(command)


def test_options_of_other_dataclasses_say_what_they_are():
    @dataclasses.dataclass(frozen=True)
    class Tea:
        pot: Annotated[str, option("Which pot.", "--pot", "-p")] = "blue"
        cups: Annotated[int | None, option("How many.", "--cups", default="enough")] = None

    def command(tea: Annotated[Tea, Fields(pot="red")]):
        print(tea)

    assert call(command, "-p", "green", "--cups", "3").output == f"{Tea('green', 3)}\n"
    assert call(command).output == f"{Tea('red')}\n"
    assert "Default: red." in call(command, "--help").output
    assert "Default: enough." in call(command, "--help").output
