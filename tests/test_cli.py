"""The command line: options, exit statuses, and what goes to which stream."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_models import save_tiny_chat_model
from typer.testing import CliRunner

from retrieval_attn import __version__, cli

SCRIPT = Path(sys.executable).with_name("retrieval-attn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    """Without a chat template."""
    return str(save_tiny_chat_model(tmp_path_factory.mktemp("plain"), chat_template=None))


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RETRIEVAL_ATTN_DEBUG", raising=False)


def call(*arguments, stdin=None):
    """What Click's runner saw; errors that `main` reports are raised."""
    return CliRunner().invoke(cli.app, list(arguments), input=stdin, catch_exceptions=False)


def call_main(capsys, *arguments):
    """Exit status and standard error of `main`."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(arguments))
    return leaving.value.code or 0, capsys.readouterr().err


# Help and version


def test_help_names_the_commands_without_loading_a_model_library():
    code = (
        "import sys\nfrom retrieval_attn.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'numba', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("chat", "generate", "bench", "demo"))
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [["chat"], ["generate"], ["demo"], ["bench"]])
def test_every_command_explains_itself(command):
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert "--help" in done.output


def test_version():
    assert call("--version").output == f"retrieval-attn {__version__}\n"


def test_without_a_command_there_is_help():
    done = call()
    assert done.exit_code == 0
    assert "generate" in done.output


def test_defaults_in_the_help_are_those_of_the_config():
    text = " ".join(call("chat", "--help").output.replace("│", " ").split())
    config = cli.RetrievalConfig()
    for name, value in (("index", config.index), ("top-k", config.top_k), ("n-sink", config.n_sink)):
        assert f"Default: {value}." in text.partition(f"--{name}")[2][:200]


# Errors


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "x", "--model", "/no/such/model"], "no model at '/no/such/model'"),
        (["generate", "x", "--index", "tree"], "'graph', 'scan', 'page', 'auto', got 'tree'"),
        (["generate", "x", "--estimator", "mean"], "estimator must be one of 'topk', 'lift', 'tail', got 'mean'"),
        (["generate", "x", "--mass", "1.5"], "mass must be above 0 and below 1"),
        (["generate", "x", "--top-k", "0"], "top_k must be an integer of at least 1, got 0"),
        (["generate", "x", "--file", "/no/such/file"], "there is no file /no/such/file"),
        (["generate", ""], "the prompt is empty"),
        (["chat", "--file", "/"], "/ is a directory"),
        (["chat", "--session", ""], "a session needs a name"),
        (["generate", "x", "--index", "grph"], "got 'grph'; did you mean graph?"),
        (["generate", "x", "--top-k", "many"], "top_k must be a whole number such as 100, got 'many'"),
        (["generate", "x", "--set", "topk=5"], "--set: unknown option 'topk'; did you mean top_k"),
        (["generate", "x", "--set", "top_k=5", "--top-k", "6"], "contradict each other (6 and 5); give one"),
        (["generate", "x", "--sample-top-k", "-1"], "sample_top_k must be 0 (off) or positive, got -1"),
        (["estimate", "--max-host-bytes", "12q"], "max_host_bytes must be bytes such as 24g, 1.5g or 800m, got '12q'"),
        (["estimate", "--device-memory", "-1g"], "--device-memory must be bytes such as 24g"),
        (["estimate", "-c", "8x"], "--context must be tokens such as 8k, 1m or 5000, got '8x'"),
        (["demo", "--tokens", "few"], "--tokens must be tokens such as 8k"),
        (["demo", "--tokens", "5"], "--tokens must be at least 2048, got '5'"),
        (["demo", "--questions", "0"], "--questions must be at least 1, got 0"),
        (["search-patterns", "--text", "x", "-o", "x.json", "--tokens", "2047"], "--tokens must be at least 2048"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, reason):
    status, text = call_main(capsys, *arguments)
    assert status == 2
    assert text.startswith("error: ")
    assert reason in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-p", "0"], ["--max-new-tokens", "0"]])
def test_bad_generation_options_are_refused(capsys, model, option):
    status, text = call_main(capsys, "generate", "x", "--model", model, *option)
    assert status == 2
    assert option[0].strip("-").replace("-", "_") in text


@pytest.mark.parametrize("option", [["--dtype", "float7"], ["--weights", "int3"], ["--device", "abacus"]])
def test_bad_model_options_are_refused(capsys, model, option):
    status, text = call_main(capsys, "generate", "x", "--model", model, *option)
    assert status == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("RETRIEVAL_ATTN_DEBUG", "1")
    with pytest.raises(ValueError, match="index must be"):
        cli.main(["generate", "x", "--index", "tree"])


def test_an_interrupt_is_one_line_and_status_130(capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupt)
    assert call_main(capsys, "generate", "x") == (130, "interrupted\n")


# Options


@pytest.mark.parametrize("command", [["chat"], ["generate"], ["estimate"]])
def test_every_field_of_the_config_is_an_option(command):
    text = call(*command, "--help").output
    for field in fields(cli.RetrievalConfig):
        assert f"--{field.name.replace('_', '-')} " in text


def test_options_reach_the_model_and_the_answer(model):
    said = ("-n", "1k", "--set", "max_new_tokens=1024,n_local=64", "--max-tokens", "24", "--sample-top-k", "1")
    done = json.loads(call("generate", "hello", "--model", model, *said, "--temperature", "9", "--json").stdout)
    assert done["stats"]["stop_reason"] == "context"
    # Drawn from the likeliest token alone, it is the likeliest.
    greedy = json.loads(call("generate", "hello", "--model", model, "--max-tokens", "24", "--json").stdout)
    assert done["token_ids"] == greedy["token_ids"]


@pytest.mark.parametrize("name", ["needle", "latency", "kernels", "recall", "memory", "compare"])
def test_the_help_of_a_benchmark_is_quick_and_speaks_of_the_fields(name):
    """It hides the bars of other libraries while they can be hidden, too."""
    code = (
        "import os, sys\nfrom retrieval_attn.cli import main\n"
        f"try:\n    main(['bench', '{name}', '--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = [name for name in ('torch', 'transformers', 'numba') if name in sys.modules]\n"
        "print(loaded, os.environ.get('TQDM_DISABLE'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "This many CPU threads work." in " ".join(done.stdout.replace("│", " ").split())
    assert done.stdout.splitlines()[-1] == "[] 1"


# generate


def test_only_the_answer_goes_to_standard_output(model):
    done = call("generate", "hello", "--model", model, "-n", "4")
    assert "TTFT" in done.stderr
    assert "TTFT" not in done.stdout
    assert done.stdout.endswith("\n")


def test_json_holds_text_ids_and_statistics(model):
    done = json.loads(call("generate", "hello", "--model", model, "-n", "4", "--json", "--no-stats").stdout)
    assert len(done["token_ids"]) == 4
    assert done["stats"]["new_tokens"] == 4
    assert isinstance(done["text"], str)


def test_the_template_is_used_unless_raw_or_absent(model, plain_model):
    def n_prompt(*arguments):
        return json.loads(call("generate", "hello", "-n", "1", "--json", *arguments).stdout)["stats"]["prompt_tokens"]

    # The template adds three special tokens.
    assert n_prompt("--model", model) == n_prompt("--model", model, "--raw") + 3
    assert n_prompt("--model", plain_model) == n_prompt("--model", plain_model, "--raw")


def test_the_prompt_comes_from_argument_file_or_standard_input(model, tmp_path):
    (tmp_path / "a.txt").write_text("hello")

    def ids(*arguments, stdin=None):
        return json.loads(call("generate", "--model", model, "--json", "-n", "4", *arguments, stdin=stdin).stdout)

    from_argument = ids("hello")["token_ids"]
    assert ids("--file", str(tmp_path / "a.txt"))["token_ids"] == from_argument
    assert ids(stdin="hello")["token_ids"] == from_argument
    assert ids("-f", str(tmp_path / "a.txt"), "you")["stats"]["prompt_tokens"] == len("hello\n\nyou") + 3


# chat


def test_one_question_about_a_file(model, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    done = call("chat", "--model", model, "-f", str(tmp_path / "a.txt"), "-p", "who sat?", "-n", "4")
    assert done.exit_code == 0
    assert "TTFT" in done.stderr
    assert "TTFT" not in done.stdout
    assert "read " in done.stderr


def test_a_named_session_goes_on_after_one_question(model, tmp_path, monkeypatch):
    arguments = ("chat", "--model", model, "--session", "notes", "-n", "4")
    assert call(*arguments, "-p", "hello").exit_code == 0
    assert (tmp_path / "data" / "retrieval-attn" / "sessions" / "notes" / "manifest.json").exists()
    done = call(*arguments, "-p", "again")
    assert "2 messages" in done.stderr
    assert "(11 cached)" in done.stderr


def test_a_restored_session_keeps_its_system_message(capsys, model, tmp_path):
    arguments = ["chat", "--model", model, "--session", str(tmp_path / "s"), "-n", "2", "-p", "hello"]
    call(*arguments, "--system", "Be brief.")
    assert "has its own system message" in call_main(capsys, *arguments, "--system", "Be long.")[1]


def test_piped_lines_are_turns(model):
    done = call("chat", "--model", model, "-n", "4", stdin="hello\n\n/stats off\nagain\n")
    assert done.exit_code == 0
    assert done.output.count("TTFT") == 1
    assert "> " not in done.output


def test_a_failed_turn_does_not_stop_the_rest(model):
    done = call("chat", "--model", model, "-n", "4", stdin="/read missing\nhello\n/exit\nnever\n")
    assert done.exit_code == 1
    assert "error: there is no file missing" in done.output
    assert done.output.count("TTFT") == 1


# The installed command


def test_the_real_console(model):
    # The last turn is not UTF-8.
    lines = b"/help\n/set bad=1\n/read missing\ncaf\xe9\n/exit\n"
    done = subprocess.run([SCRIPT, "chat", "--model", model, "-n", "2"], input=lines, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"/sessions" in done.stdout
    assert b"unknown option 'bad'" in done.stdout
    assert b"there is no file missing" in done.stdout
    assert b"TTFT" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.long
def test_a_wrong_path_on_the_real_console():
    done = subprocess.run([SCRIPT, "chat", "--model", "/no/such/model"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no model at '/no/such/model'")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
