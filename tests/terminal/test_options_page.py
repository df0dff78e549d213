"""docs/options.md is what the fields' documentation says."""

from pathlib import Path

from typer.testing import CliRunner

from retrieval_attn.cli import app
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.terminal.option_language import words_of
from retrieval_attn.terminal.options_page import options_page

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_is_not_stale():
    assert PAGE.read_text() == options_page(), "write it anew: retrieval-attn options > docs/options.md"


def test_the_page_has_every_option():
    for word in [*words_of(RetrievalConfig).values(), *words_of(Sampling).values()]:
        lines = [line for line in options_page().splitlines() if line.startswith(f"- `--{word.name.replace('_', '-')}")]
        assert any(word.sentence.removesuffix(".") in line for line in lines)
        assert all("Default: None" not in line for line in lines)


def test_the_command_prints_the_page():
    assert CliRunner().invoke(app, ["options"]).output == options_page()
