"""Whole numbers with units."""

import pytest

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.option_language import words_of
from retrieval_attn.terminal.units import parse_bytes, parse_count, parse_length, parse_lengths


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("5000", 5000),
        ("8k", 8192),
        ("32K", 32768),
        ("1m", 1 << 20),
        ("24g", 24 << 30),
        ("1.5g", 3 << 29),
        ("0.5k", 512),
        (" 7 ", 7),
        ("-3", -3),
        ("1.3k", 1331),
    ],
)
def test_numbers(text, number):
    assert parse_count(text, "x") == number


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1e3", "nan", "inf", "8kb", "1 000", ".5k", "4.k", "\u0661k", "0x10", "1_000"]
)
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="x must be a whole number such as 100, got "):
        parse_count(text, "x")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2e9", 2 * 10**9),
        ("2E+9", 2 * 10**9),
        (".5g", 1 << 29),
        ("4.g", 4 << 30),
        ("1.5e3k", 1500 << 10),
        ("0", 0),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_bytes_are_also_written_as_floats(text, number):
    assert parse_bytes(text, "--x") == number
    assert words_of(RetrievalConfig)["max_host_bytes"].parse(text) == number


@pytest.mark.parametrize("bad", ["", "g", "-1g", "-2e9", "nan", "1e400", ".", ".g", "e9", "4.", "2e-9", "0x10"])
def test_bytes(bad):
    assert parse_bytes("0", "--x") == 0
    assert parse_bytes("1.5G", "--x") == 3 << 29
    with pytest.raises(ValueError, match="--x must be bytes such as 24g, 1.5g or 800m, got "):
        parse_bytes(bad, "--x")


def test_lengths():
    assert parse_lengths("8k, 32K,1m,5000,8k", "-c") == (8192, 32768, 1 << 20, 5000)
    assert parse_length("2k", "-c", least=2048) == 2048
    with pytest.raises(ValueError, match="-c must be at least 2048, got '2047'"):
        parse_length("2047", "-c", least=2048)
    for text in ("0", "8k,-1", "8k,0"):
        with pytest.raises(ValueError, match="-c must be at least 1, got "):
            parse_lengths(text, "-c")
    for text in ("", "8k,", "8q", ",8k"):
        with pytest.raises(ValueError, match="-c must be tokens such as 8k, 1m or 5000, got "):
            parse_lengths(text, "-c")
