"""What `retrieval-attn bench recall` was asked for, checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retrieval_attn.bench.shared.options import (
    LAYER_DTYPES,
    LayerShape,
    at_least,
    at_least_if_given,
    choose,
    parse_contexts,
    parse_shape,
)

# Attention over all keys beside those that search: stock sdpa with the head group folded, and faiss.
RIVALS = ("folded", "hnsw", "faiss-ivf")


@dataclass(frozen=True)
class Options:
    """One sweep: every source, context and seed, with every method at every effort.

    sources: as `bench.vectors.vectors` takes them; "real" is every layer. efforts: by method, instead of its ladder.
    queries: held-out queries per head. capture: a file of real vectors, written if it is not there.
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


def make_options(
    source: str, context: str, seed: str, index: str, compare: str, estimators: str, effort: Sequence[str], top_k: int,
    queries: int, shape: str, dtype: str, threads: int | None, model: str | None, text: Path | None,
    capture: Path | None, check: bool,
) -> Options:  # fmt: skip
    """Options from what the command line gave; ValueError in one line for what cannot be."""
    from retrieval_attn.bench.recall.estimators import ESTIMATORS
    from retrieval_attn.index import INDEX_KINDS

    methods = _names(compare, RIVALS, "--compare") + _names(index, INDEX_KINDS, "--index")
    if not methods:
        raise ValueError("--index and --compare name no method; give at least one")
    layer_shape = parse_shape(shape)
    if layer_shape is None:
        raise ValueError(
            '--shape must be llama3-8b or H,G,D; for the embedded model take --source real, got "embedded"'
        )
    if text is not None and not text.is_file():
        raise ValueError(f"--text must be a file that exists, got {str(text)!r}")
    return Options(
        sources=_sources(source),
        contexts=parse_contexts(context),
        seeds=_integers(seed, 0, "--seed"),
        methods=methods,
        estimators=_names(estimators, tuple(ESTIMATORS), "--estimator"),
        efforts=_efforts(effort, methods),
        top_k=at_least(top_k, 1, "--top-k"),
        queries=at_least(queries, 1, "--queries"),
        shape=layer_shape,
        dtype=choose(dtype, LAYER_DTYPES, "--dtype"),
        threads=at_least_if_given(threads, 1, "--threads"),
        model=model,
        text=text,
        capture=capture,
        check=check,
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
