"""What the options of benchmarks may say, and how it is read; every parser raises ValueError in one line. Cheap.

Options that many of them share stand in dataclasses, see `terminal.options.with_options`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from retrieval_attn.bench.shared.pictures import check_plot
from retrieval_attn.bench.shared.report import FORMATS, check_writable
from retrieval_attn.config import DTYPES, RetrievalConfig
from retrieval_attn.terminal.options import MODEL, option

DEVICES = ("auto", "cpu", "cuda")

# Of a layer's made-up vectors.
LAYER_DTYPES = ("bfloat16", "float32")

Context = Annotated[str, option("Token counts; k = 1024, m = 1024 k.", "--context", "-c")]
Form = Annotated[str, option(f"Written to stdout: {', '.join(FORMATS)}.", "--output", "-o")]
Out = Annotated[Path | None, option("Also write the report, as JSON, to this file.", "--out")]
Plot = Annotated[Path | None, option("Also draw it: .png or .svg.", "--plot")]
Check = Annotated[bool, option("Compare what was found with what is right.", "--check/--no-check")]
LayerDtype = Annotated[str, option(f"{' or '.join(LAYER_DTYPES)}.", "--dtype", panel=MODEL)]
Device = Annotated[str, option(f"{', '.join(DEVICES)}.", "--device", panel=MODEL)]


@dataclass(frozen=True)
class WholeModel:
    """Which model is loaded, where to, and with which numbers; see `load`. ValueError for what is none."""

    model: Annotated[
        str | None, option("A folder, GGUF file or hub id.", "--model", "-m", panel=MODEL, default="the embedded model")
    ] = None
    device: Device = "auto"
    dtype: Annotated[str, option(f"{', '.join(DTYPES)}.", "--dtype", panel=MODEL)] = "auto"

    def __post_init__(self) -> None:
        choose(self.device, DEVICES, "--device")
        choose(self.dtype, DTYPES, "--dtype")


@dataclass(frozen=True)
class ReportTo:
    """Where a report goes. ValueError or ImportError now for what could not be written after a long run."""

    form: Form = "md"
    out: Out = None
    plot: Plot = None

    def __post_init__(self) -> None:
        choose(self.form, FORMATS, "--output")
        if self.plot is not None:
            check_plot(self.plot)
        if self.out is not None:
            check_writable(self.out, "--out")


def config_as_dict(config: RetrievalConfig, *names: str) -> dict[str, Any]:
    """Plain data of a config, for a report: the fields of these names, and those that are not the default."""
    plain, default = asdict(config), asdict(RetrievalConfig())
    return {name: value for name, value in plain.items() if name in names or value != default[name]}


class LayerShape(NamedTuple):
    """An attention layer: query heads, KV heads, head dimension."""

    H: int
    G: int
    D: int


SHAPES = {"llama3-8b": LayerShape(32, 8, 128)}


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
