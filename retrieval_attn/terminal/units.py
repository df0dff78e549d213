"""Whole numbers as people write them: 24g bytes, 32k tokens, 5000. One parser for every option."""

import re

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

# What a wrong number should have looked like.
NUMBER, TOKENS, BYTES = "a whole number such as 100", "tokens such as 8k, 1m or 5000", "bytes such as 24g, 1.5g or 800m"

# A fraction needs a unit: half a byte is nothing. Bytes may also be 2e9, .5g or 4.g.
_COUNT = re.compile(r"[+-]?(\d+[kmg]?|\d+\.\d+[kmg])", re.ASCII)
_BYTES = re.compile(r"[+-]?(\d+[kmg]?|(\d+\.?\d*|\.\d+)(e\+?\d{1,2}[kmg]?|[kmg]))", re.ASCII)


def parse_count(text: str, name: str, like: str = NUMBER) -> int:
    """The number that a text says, with units of 1024: "8k" is 8192, "1.5g" one and a half times 2 ** 30.

    name, like: what the option is called and what it takes, for the error. Raises ValueError in one line.
    """
    said = text.strip().lower()
    if not (_BYTES if like == BYTES else _COUNT).fullmatch(said):
        raise ValueError(f"{name} must be {like}, got {text!r}")
    number = said.rstrip("kmg")
    unit = UNITS[said[len(number) :]]
    # A float would round what is above 2 ** 53.
    return int(number) * unit if number.lstrip("+-").isdecimal() else int(float(number) * unit)


def parse_bytes(text: str, name: str) -> int:
    """A number of bytes, at least 0, such as "24g"; ValueError for others."""
    n_bytes = parse_count(text, name, BYTES)
    if n_bytes < 0:
        raise ValueError(f"{name} must be {BYTES}, got {text!r}")
    return n_bytes


def parse_length(text: str, name: str, least: int = 1) -> int:
    """A number of tokens, such as "64k"; ValueError for others and for too few."""
    length = parse_count(text, name, TOKENS)
    if length < least:
        raise ValueError(f"{name} must be at least {least}, got {text!r}")
    return length


def parse_lengths(text: str, name: str) -> tuple[int, ...]:
    """Token counts from a list such as "8k,32k,1m,5000", each once; ValueError for others."""
    return tuple(dict.fromkeys(parse_length(part, name) for part in text.replace(" ", "").split(",")))
