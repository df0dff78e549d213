"""What `retrieval-attn bench kernels` was asked for, checked. Cheap to import."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from retrieval_attn.bench.shared.options import (
    DEVICES,
    LAYER_DTYPES,
    SHAPES,
    Context,
    Device,
    LayerDtype,
    LayerShape,
    at_least,
    choose,
    parse_names,
    parse_shape,
)
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import option
from retrieval_attn.terminal.units import parse_lengths

# Those of the paper's sizes come last.
PATTERNS = ("auto", "mass_vertical_slash", "a_shape", "vertical_slash", "block_sparse")
STEPS = ("near", "merge")


@dataclass(frozen=True)
class Asked:
    """What is measured, as it was written."""

    context: Context = "8k,32k"
    patterns: Annotated[str, option(f"{', '.join(PATTERNS)}; or none.", "--patterns")] = ",".join(PATTERNS)
    steps: Annotated[str, option(f"{', '.join(STEPS)}; or none.", "--steps")] = ",".join(STEPS)
    source: Annotated[str, option("shaped_mixed, shaped, or real:LAYER.", "--source", "-s")] = "shaped_mixed"
    shape: Annotated[str, option(f"{', '.join(SHAPES)} or H,G,D; a real layer has its own.", "--shape")] = "llama3-8b"
    mass: Annotated[float, option("Attention mass that the first two keep.", "--mass")] = RetrievalConfig.prefill_mass
    chunk: Annotated[int, option("Queries in a call of prefill.", "--chunk")] = RetrievalConfig.prefill_chunk
    repeat: Annotated[int, option("Turns; kernels take turns in each.", "--repeat", "-r")] = 3
    dtype: LayerDtype = "bfloat16"
    device: Device = "auto"


@dataclass(frozen=True)
class Options:
    """One sweep: prefill by every pattern and by dense attention at every length, and the kernels of decode.

    mass: of "auto" and "mass_vertical_slash". chunk: queries in a call of prefill. repeat: turns of each kernel.
    """

    lengths: tuple[int, ...]
    patterns: tuple[str, ...]
    steps: tuple[str, ...]
    source: str
    shape_name: str
    shape: LayerShape
    mass: float
    chunk: int
    repeat: int
    dtype: str
    device: str
    threads: int | None
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        plain = {**asdict(self), "mode": "kernels", "shape": self.shape_name}
        del plain["shape_name"]
        plain["H"], plain["G"], plain["D"] = self.shape
        return plain


def make_options(asked: Asked, config: RetrievalConfig) -> Options:
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    shape = parse_shape(asked.shape)
    if shape is None:
        raise ValueError(
            '--shape must be llama3-8b or H,G,D; for the embedded model take --source real:LAYER, got "embedded"'
        )
    if not 0 < asked.mass < 1:
        raise ValueError(f"--mass must be above 0 and below 1 (a share of the attention mass), got {asked.mass}")
    return Options(
        lengths=parse_lengths(asked.context, "--context"),
        patterns=parse_names(asked.patterns, PATTERNS, "--patterns"),
        steps=parse_names(asked.steps, STEPS, "--steps"),
        source=_checked(asked.source),
        shape_name=asked.shape,
        shape=shape,
        mass=asked.mass,
        chunk=at_least(asked.chunk, 1, "--chunk"),
        repeat=at_least(asked.repeat, 1, "--repeat"),
        dtype=choose(asked.dtype, LAYER_DTYPES, "--dtype"),
        device=choose(asked.device, DEVICES, "--device"),
        threads=config.threads,
        seed=config.seed,
    )


def _checked(source: str) -> str:
    from retrieval_attn.bench.vectors.prefill import check_source

    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return source
