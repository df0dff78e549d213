"""What `retrieval-attn bench latency` was asked for, checked. Cheap to import."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from retrieval_attn.bench.shared.options import (
    DEVICES,
    LAYER_DTYPES,
    SHAPES,
    Check,
    Context,
    Device,
    LayerDtype,
    LayerShape,
    at_least,
    choose,
    config_as_dict,
    parse_names,
    parse_shape,
)
from retrieval_attn.config import INDEX_KINDS, RetrievalConfig
from retrieval_attn.terminal.options import MODEL, Fields, option
from retrieval_attn.terminal.units import parse_lengths

RIVALS = ("full", "folded")

# Short contexts, too, are indexed: a row says what it measured. The index is the method's, and no turn follows another.
Config = Annotated[
    RetrievalConfig,
    Fields("top_k", "estimator", "threads", "seed", without=("index", "followup"), exact_below=0),
]

# What only a model has: layers alone run no prefill.
_OF_PREFILL = ("prefill", "prefill_mass", "dense_below", "prefill_chunk", "prefill_tile", "device_kv_budget")

_LAYERS = {"llama3-8b": 32}


@dataclass(frozen=True)
class Asked:
    """What is measured, as it was written."""

    context: Context = "8k,32k,128k"
    gen: Annotated[int, option("Decode steps per repeat.", "--gen", "-n")] = 32
    repeat: Annotated[int, option("Repeats; methods take turns in each.", "--repeat", "-r")] = 3
    warmup: Annotated[int, option("Repeats that are not counted.", "--warmup")] = 1
    index: Annotated[str, option(f"Indexes: {', '.join(INDEX_KINDS)}; or none.", "--index")] = "exact,graph,scan"
    compare: Annotated[str, option(f"Rivals: {', '.join(RIVALS)}; or none.", "--compare")] = "full,folded"
    layers: Annotated[int | None, option("Attention layers.", "--layers", default="those of --shape")] = None
    shape: Annotated[str, option(f"{', '.join(SHAPES)}, embedded (whole model), or H,G,D.", "--shape")] = "llama3-8b"
    model: Annotated[
        str | None, option("Measure this whole model: a folder, GGUF file or hub id.", "--model", "-m", panel=MODEL)
    ] = None
    dtype: LayerDtype = "bfloat16"
    device: Device = "auto"
    check: Check = True


@dataclass(frozen=True)
class Options:
    """One sweep. shape: None measures a whole model (`model`; None is the embedded one), else attention alone. config:
    of every method of ours, but for its index."""

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
    device: str
    check: bool
    config: RetrievalConfig

    @property
    def mode(self) -> str:
        return "layer" if self.shape else "model"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        plain = {**asdict(self), "mode": self.mode, "shape": self.shape_name}
        del plain["shape_name"], plain["config"]
        plain |= config_as_dict(self.config, "top_k", "estimator", "threads", "seed")
        if self.shape:
            plain["H"], plain["G"], plain["D"] = self.shape
        return plain


def make_options(asked: Asked, config: RetrievalConfig) -> Options:
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    shape = None if asked.model is not None else parse_shape(asked.shape)
    methods = parse_names(asked.compare, RIVALS, "--compare") + parse_names(asked.index, INDEX_KINDS, "--index")
    if not methods:
        raise ValueError("--index and --compare name no method; give at least one")
    if shape is None and asked.layers is not None:
        raise ValueError("--layers goes with --shape llama3-8b or H,G,D; a model has the layers it has")
    if shape is not None:
        _refuse_prefill(config)
    layers = asked.layers if asked.layers is not None else _LAYERS.get(asked.shape, 1)
    return Options(
        contexts=parse_lengths(asked.context, "--context"),
        methods=methods,
        shape_name=asked.shape if asked.model is None else Path(asked.model).name,
        shape=shape,
        model=asked.model,
        layers=at_least(layers, 1, "--layers"),
        gen=at_least(asked.gen, 1, "--gen"),
        repeat=at_least(asked.repeat, 1, "--repeat"),
        warmup=at_least(asked.warmup, 0, "--warmup"),
        dtype=choose(asked.dtype, LAYER_DTYPES, "--dtype"),
        device=choose(asked.device, DEVICES, "--device"),
        check=asked.check,
        config=config,
    )


def _refuse_prefill(config: RetrievalConfig) -> None:
    """ValueError for what would stand in the report as if it had been measured."""
    plain = RetrievalConfig()
    for name in _OF_PREFILL:
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{name} goes with --shape embedded or --model; layers alone run no prefill")
