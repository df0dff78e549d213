"""What the quality benchmarks were asked for, checked; the options that their commands share. Cheap to import."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from retrieval_attn.bench.methods.names import METHODS
from retrieval_attn.bench.shared.options import (
    Context,
    ReportTo,
    WholeModel,
    at_least,
    at_least_if_given,
    config_as_dict,
)
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.option_language import unknown, words_of
from retrieval_attn.terminal.options import Fields, option
from retrieval_attn.terminal.units import parse_lengths

DEFAULT_METHODS = "full,graph,scan,page,streaming"

CONFIG_FIELDS = ("top_k", "followup", "seed", "threads")

# The index is the method's.
Config = Annotated[RetrievalConfig, Fields(*CONFIG_FIELDS, without=("index",), followup="retrieve")]

# Of benchmarks that read one text exactly, which is all that they read.
ExactConfig = Annotated[RetrievalConfig, Fields("top_k", "seed", "threads", without=("index", "followup"))]
ONE_TEXT = ("context", "method", "limit", "text")


@dataclass(frozen=True)
class Asked:
    """What is measured, as it was written: prompts, methods, and how much of it."""

    context: Context = "8k,32k"
    method: Annotated[
        str,
        option("Methods, as in graph,scan:top_k=200:followup=exact; `bench compare --help` lists them.", "--method"),
    ] = DEFAULT_METHODS
    samples: Annotated[int, option("Examples of each task and length.", "--samples")] = 1
    limit: Annotated[
        int | None, option("Stop after so many examples of each task, or contexts times methods.", "--limit")
    ] = None
    text: Annotated[
        Path | None, option("A text to read, or to hide things in.", "--text", default="generated prose")
    ] = None


@dataclass(frozen=True)
class KeptReport(ReportTo):
    """Where a report goes, and what an interrupted run leaves."""

    resume: Annotated[bool, option("Go on with what an interrupted run kept beside --out.", "--resume")] = False
    scores_only: Annotated[
        bool, option("On stdout only what a second run repeats to the byte: no times, no memory.", "--scores-only")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.out is None:
            raise ValueError("--resume goes on with what lies beside --out; say which file that was")


@dataclass(frozen=True)
class Settings:
    """One run. methods: as the user wrote them. config: of the methods, where they do not say otherwise. options: what
    is the command's own, as plain data."""

    bench: str
    model: str | None
    contexts: tuple[int, ...]
    methods: tuple[str, ...]
    samples: int
    limit: int | None
    text: str | None
    config: RetrievalConfig
    device: str
    dtype: str
    options: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of examples and indexes."""
        return self.config.seed

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report and for --resume."""
        plain = {**asdict(self), "contexts": list(self.contexts), "methods": list(self.methods)}
        del plain["config"]
        return {**plain, **config_as_dict(self.config, *CONFIG_FIELDS), **plain.pop("options")}


def make_settings(bench: str, asked: Asked, model: WholeModel, config: RetrievalConfig, **options: Any) -> Settings:
    """Settings from what the command line gave; ValueError in one line for what cannot be.

    Methods are checked when a model's config is at hand, see `methods.named.parse_method`.
    """
    names = split_methods(asked.method)
    if not names:
        raise ValueError("--method names no method; give at least one, as in --method full,scan")
    return Settings(
        bench=bench,
        model=model.model,
        contexts=parse_lengths(asked.context, "--context"),
        methods=names,
        samples=at_least(asked.samples, 1, "--samples"),
        limit=at_least_if_given(asked.limit, 1, "--limit"),
        text=None if asked.text is None else str(asked.text),
        config=config,
        device=model.device,
        dtype=model.dtype,
        options=options,
    )


def split_methods(text: str) -> tuple[str, ...]:
    """Methods from a list, each once. A comma may stand in a free text, as in scan:kv_dir=/a,b: what follows is a
    method if it begins with the name of one."""
    found: list[str] = []
    for part in text.split(","):
        if part.strip() and found and _ends_in_text(found[-1]) and part.split(":")[0].strip() not in METHODS:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(dict.fromkeys(part.strip() for part in found if part.strip()))


def _ends_in_text(method: str) -> bool:
    """Whether the last option of a method takes any text."""
    name, equals, _ = method.rpartition(":")[2].partition("=")
    word = words_of(RetrievalConfig).get(name)
    return bool(equals) and word is not None and word.kind == "str" and not word.allowed


def parse_tasks(text: str, allowed: Sequence[str], groups: dict[str, Sequence[str]]) -> list[str]:
    """Tasks from a list of names and groups, each once; ValueError with what comes near to an unknown one."""
    found: list[str] = []
    for name in (part for part in text.replace(" ", "").split(",") if part):
        if name not in allowed and name not in groups:
            raise ValueError(unknown("task", name, [*allowed, *groups]))
        found += groups.get(name, [name])
    if not found:
        raise ValueError(f"--task names no task; choose from {', '.join([*allowed, *groups])}")
    return list(dict.fromkeys(found))
