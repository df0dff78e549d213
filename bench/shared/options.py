"""What the options of benchmarks may say, and how it is read; every parser raises ValueError in one line. Cheap."""

from typing import NamedTuple

DEVICES = ("auto", "cpu", "cuda")

# Of a whole model, and of a layer's made-up vectors.
DTYPES = ("auto", "float32", "bfloat16", "float16")
LAYER_DTYPES = ("bfloat16", "float32")

_UNITS = {"k": 1 << 10, "m": 1 << 20}


class LayerShape(NamedTuple):
    """An attention layer: query heads, KV heads, head dimension."""

    H: int
    G: int
    D: int


SHAPES = {"llama3-8b": LayerShape(32, 8, 128)}


def parse_contexts(text: str) -> tuple[int, ...]:
    """Token counts from a list such as "8k,32k,1m,5000"; k is 1024, m is 1024 * 1024. ValueError for others."""
    found = []
    for part in text.lower().replace(" ", "").split(","):
        digits, unit = (part[:-1], _UNITS[part[-1]]) if part[-1:] in _UNITS else (part, 1)
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"--context must list token counts such as 8k,32k,1m or 5000, got {part!r} in {text!r}")
        found.append(int(digits) * unit)
    return tuple(dict.fromkeys(found))


def parse_names(text: str, allowed: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Names from a comma-separated list, each once; ValueError naming the allowed ones. "none" and "" give none."""
    names = [part for part in text.lower().replace(" ", "").split(",") if part and part != "none"]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{flag} must be of {', '.join(allowed)} (or none), got {name!r}")
    return tuple(dict.fromkeys(names))


def parse_shape(text: str) -> LayerShape | None:
    """A known shape, H,G,D, or None for "embedded"; ValueError for anything else."""
    if text == "embedded":
        return None
    if text in SHAPES:
        return SHAPES[text]
    parts = text.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--shape must be one of {', '.join([*SHAPES, 'embedded'])} or H,G,D such as 32,8,128, got {text!r}"
        )
    shape = LayerShape(*map(int, parts))
    if shape.H % shape.G or shape.D % 16:
        raise ValueError(f"--shape H,G,D needs H a multiple of G and D a multiple of 16, got {text!r}")
    return shape


def choose(value: str, allowed: tuple[str, ...], flag: str) -> str:
    """`value` if it is allowed, else ValueError."""
    if value not in allowed:
        raise ValueError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def at_least(value: int, least: int, flag: str) -> int:
    """`value` if it is large enough, else ValueError."""
    if value < least:
        raise ValueError(f"{flag} must be at least {least}, got {value}")
    return value


def at_least_if_given(value: int | None, least: int, flag: str) -> int | None:
    """As `at_least`; None, for what was not given, stays None."""
    return None if value is None else at_least(value, least, flag)
