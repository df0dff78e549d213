"""What `retrieval-attn bench kernels` was asked for, checked. Cheap to import."""

from dataclasses import asdict, dataclass
from typing import Any

from retrieval_attn.bench.shared.options import (
    DEVICES,
    LAYER_DTYPES,
    LayerShape,
    at_least,
    at_least_if_given,
    choose,
    parse_contexts,
    parse_names,
    parse_shape,
)

# Those of the paper's sizes come last.
PATTERNS = ("auto", "mass_vertical_slash", "a_shape", "vertical_slash", "block_sparse")
STEPS = ("near", "merge")


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


def make_options(
    lengths: str, patterns: str, steps: str, source: str, shape: str, mass: float, chunk: int, repeat: int, dtype: str,
    device: str, threads: int | None, seed: int,
) -> Options:  # fmt: skip
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    layer_shape = parse_shape(shape)
    if layer_shape is None:
        raise ValueError(
            '--shape must be llama3-8b or H,G,D; for the embedded model take --source real:LAYER, got "embedded"'
        )
    if not 0 < mass < 1:
        raise ValueError(f"--mass must be above 0 and below 1 (a share of the attention mass), got {mass}")
    return Options(
        lengths=parse_contexts(lengths),
        patterns=parse_names(patterns, PATTERNS, "--patterns"),
        steps=parse_names(steps, STEPS, "--steps"),
        source=_checked(source),
        shape_name=shape,
        shape=layer_shape,
        mass=mass,
        chunk=at_least(chunk, 1, "--chunk"),
        repeat=at_least(repeat, 1, "--repeat"),
        dtype=choose(dtype, LAYER_DTYPES, "--dtype"),
        device=choose(device, DEVICES, "--device"),
        threads=at_least_if_given(threads, 1, "--threads"),
        seed=at_least(seed, 0, "--seed"),
    )


def _checked(source: str) -> str:
    from retrieval_attn.bench.vectors.prefill import check_source

    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return source
