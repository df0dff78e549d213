"""What `retrieval-attn bench recall` was asked for, checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from retrieval_attn.bench.shared.options import (
    LAYER_DTYPES,
    SHAPES,
    Check,
    LayerDtype,
    LayerShape,
    at_least,
    choose,
    parse_shape,
)
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import option
from retrieval_attn.terminal.units import parse_lengths

# Attention over all keys beside those that search: stock sdpa with the head group folded, and faiss.
RIVALS = ("folded", "hnsw", "faiss-ivf")


@dataclass(frozen=True)
class Asked:
    """What is measured, as it was written."""

    source: Annotated[
        str,
        option(
            "Vectors: shaped, real, real:LAYER, uniform, giant, duplicates, zeros, self, drift; or all.",
            "--source",
            "-s",
        ),
    ] = "shaped"
    context: Annotated[str, option("Numbers of keys; k = 1024, m = 1024 k.", "--context", "-c")] = "128k"
    index: Annotated[str, option("Our indexes, such as exact,graph; or all, or none.", "--index")] = "all"
    compare: Annotated[str, option(f"Rivals: {', '.join(RIVALS)}; or all, or none.", "--compare")] = "hnsw,faiss-ivf"
    estimator: Annotated[
        str,
        option("topk, lift, tail, and topk-group, tail-group (a head group shares); or all, or none.", "--estimator"),
    ] = "all"
    effort: Annotated[list[str] | None, option("METHOD=N,N,... instead of its own ladder; repeatable.", "--effort")] = (
        None
    )
    queries: Annotated[int, option("Held-out queries per head.", "--queries")] = 64
    shape: Annotated[str, option(f"{', '.join(SHAPES)} or H,G,D; a real layer has its own.", "--shape")] = "llama3-8b"
    dtype: LayerDtype = "bfloat16"
    seed: Annotated[str, option("Seeds of vectors, texts and indexes, such as 0,1,2.", "--seed")] = "0"
    model: Annotated[
        str | None,
        option("Model of real vectors: a folder, GGUF file or hub id.", "--model", "-m", default="the embedded model"),
    ] = None
    text: Annotated[
        Path | None, option("Text that the model reads, beside the facts.", "--text", default="generated prose")
    ] = None
    capture: Annotated[Path | None, option("File of real vectors: read if it is there, else written.", "--capture")] = (
        None
    )
    check: Check = True

    def __post_init__(self) -> None:
        if self.text is not None and not self.text.is_file():
            raise ValueError(f"--text must be a file that exists, got {str(self.text)!r}")


@dataclass(frozen=True)
class Options:
    """One sweep: every source, context and seed, with every method at every effort.

    sources: as `bench.vectors.sources.vectors` takes them; "real" is every layer. efforts: by method, instead of its
    ladder. queries: held-out queries per head. capture: a file of real vectors, written if it is not there.
    """

    sources: tuple[str, ...]
    contexts: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    estimators: tuple[str, ...]
    efforts: dict[str, tuple[int, ...]]
    top_k: int
    queries: int
    shape: LayerShape
    dtype: str
    threads: int | None
    model: str | None
    text: Path | None
    capture: Path | None
    check: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        plain = asdict(self)
        plain["H"], plain["G"], plain["D"] = plain.pop("shape")
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def make_options(asked: Asked, config: RetrievalConfig) -> Options:
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    from retrieval_attn.bench.recall.estimators import ESTIMATORS
    from retrieval_attn.index import INDEX_KINDS

    methods = _names(asked.compare, RIVALS, "--compare") + _names(asked.index, INDEX_KINDS, "--index")
    if not methods:
        raise ValueError("--index and --compare name no method; give at least one")
    shape = parse_shape(asked.shape)
    if shape is None:
        raise ValueError(
            '--shape must be llama3-8b or H,G,D; for the embedded model take --source real, got "embedded"'
        )
    return Options(
        sources=_sources(asked.source),
        contexts=parse_lengths(asked.context, "--context"),
        seeds=_integers(asked.seed, 0, "--seed"),
        methods=methods,
        estimators=_names(asked.estimator, tuple(ESTIMATORS), "--estimator"),
        efforts=_efforts(asked.effort or [], methods),
        top_k=config.top_k,
        queries=at_least(asked.queries, 1, "--queries"),
        shape=shape,
        dtype=choose(asked.dtype, LAYER_DTYPES, "--dtype"),
        threads=config.threads,
        model=asked.model,
        text=asked.text,
        capture=asked.capture,
        check=asked.check,
    )


def _names(text: str, allowed: Sequence[str], flag: str) -> tuple[str, ...]:
    """Names from a comma-separated list, each once; "all" is every one, "none" and "" are none."""
    names = _parts(text)
    if names == ["all"]:
        return tuple(allowed)
    for name in names:
        if name not in (*allowed, "none"):
            raise ValueError(f"{flag} must be of {', '.join(allowed)} (or all, or none), got {name!r}")
    return tuple(dict.fromkeys(name for name in names if name != "none"))


def _sources(text: str) -> tuple[str, ...]:
    from retrieval_attn.bench.vectors.sources import SOURCES, check_source

    names = list(SOURCES) if text.strip() == "all" else _parts(text)
    if not names:
        raise ValueError(f"--source must be of {', '.join(SOURCES)} (or all), got {text!r}")
    for name in names:
        check_source(name)
    return tuple(dict.fromkeys(names))


def _efforts(given: Sequence[str], methods: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in given:
        method, equals, numbers = text.replace(" ", "").partition("=")
        if not equals or method not in methods:
            raise ValueError(
                f"--effort must be METHOD=N,N,... for a method that is measured ({', '.join(methods)}), got {text!r}"
            )
        found[method] = _integers(numbers, 1, "--effort")
    return found


def _integers(text: str, least: int, flag: str) -> tuple[int, ...]:
    parts = _parts(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{flag} must list integers such as 1,2,3, got {text!r}")
    return tuple(dict.fromkeys(at_least(int(part), least, flag) for part in parts))


def _parts(text: str) -> list[str]:
    return [part for part in text.lower().replace(" ", "").split(",") if part]
