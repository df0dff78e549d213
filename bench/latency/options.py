"""What `retrieval-attn bench latency` was asked for, checked. Cheap to import."""

from dataclasses import asdict, dataclass
from pathlib import Path
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
from retrieval_attn.config import ESTIMATORS, INDEX_KINDS

RIVALS = ("full", "folded")

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
        dtype=choose(dtype, LAYER_DTYPES, "--dtype"),
        top_k=at_least(top_k, 1, "--top-k"),
        estimator=choose(estimator, ESTIMATORS, "--estimator"),
        threads=at_least_if_given(threads, 1, "--threads"),
        seed=at_least(seed, 0, "--seed"),
        device=choose(device, DEVICES, "--device"),
        check=check,
    )
