"""What `retrieval-attn bench latency` was asked for, checked. Cheap to import."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.config import ESTIMATORS, INDEX_KINDS

RIVALS = ("full", "folded")
DTYPES = ("bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")

_UNITS = {"k": 1 << 10, "m": 1 << 20}


class LayerShape(NamedTuple):
    """An attention layer: query heads, KV heads, head dimension."""

    H: int
    G: int
    D: int


SHAPES = {"llama3-8b": LayerShape(32, 8, 128)}
_LAYERS = {"llama3-8b": 32}


@dataclass(frozen=True)
class Options:
    """One sweep. shape: None measures a whole model (`model`; None is the embedded one), else attention alone."""

    contexts: tuple[int, ...]
    methods: tuple[str, ...]
    shape_name: str
    shape: LayerShape | None
    model: str | None
    layers: int
    gen: int
    repeat: int
    warmup: int
    dtype: str
    top_k: int
    estimator: str
    threads: int | None
    seed: int
    device: str
    check: bool

    @property
    def mode(self) -> str:
        return "layer" if self.shape else "model"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        plain = {**asdict(self), "mode": self.mode, "shape": self.shape_name}
        del plain["shape_name"]
        if self.shape:
            plain["H"], plain["G"], plain["D"] = self.shape
        return plain


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


def make_options(
    context: str, gen: int, repeat: int, warmup: int, index: str, compare: str, layers: int | None, shape: str,
    model: str | None, dtype: str, top_k: int, estimator: str, threads: int | None, seed: int, device: str, check: bool,
) -> Options:  # fmt: skip
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    layer_shape = None if model is not None else parse_shape(shape)
    methods = parse_names(compare, RIVALS, "--compare") + parse_names(index, INDEX_KINDS, "--index")
    if not methods:
        raise ValueError("--index and --compare name no method; give at least one")
    if layer_shape is None and layers is not None:
        raise ValueError("--layers goes with --shape llama3-8b or H,G,D; a model has the layers it has")
    return Options(
        contexts=parse_contexts(context),
        methods=methods,
        shape_name=shape if model is None else Path(model).name,
        shape=layer_shape,
        model=model,
        layers=at_least(layers if layers is not None else _LAYERS.get(shape, 1), 1, "--layers"),
        gen=at_least(gen, 1, "--gen"),
        repeat=at_least(repeat, 1, "--repeat"),
        warmup=at_least(warmup, 0, "--warmup"),
        dtype=choose(dtype, DTYPES, "--dtype"),
        top_k=at_least(top_k, 1, "--top-k"),
        estimator=choose(estimator, ESTIMATORS, "--estimator"),
        threads=None if threads is None else at_least(threads, 1, "--threads"),
        seed=at_least(seed, 0, "--seed"),
        device=choose(device, DEVICES, "--device"),
        check=check,
    )
