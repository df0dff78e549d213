"""What the quality benchmarks were asked for, checked; the options that their commands share. Cheap to import."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.shared.options import DEVICES, DTYPES, at_least, at_least_if_given, choose, parse_contexts

FOLLOWUPS = ("exact", "retrieve")

DEFAULT_METHODS = "full,graph,scan,page,streaming"


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


Context = Annotated[str, _option("Prompt tokens; k = 1024, m = 1024 k.", "--context", "-c")]
MethodsOption = Annotated[
    str, _option("Methods, as in graph,scan:top_k=200:followup=exact; `bench compare --help` lists them.", "--method")
]
ModelOption = Annotated[str | None, _option("A folder or hub id (default: the embedded model).", "--model", "-m")]
Samples = Annotated[int, _option("Examples of each task and length.", "--samples")]
Limit = Annotated[int | None, _option("Stop after so many examples of each task: a smoke run.", "--limit")]
Text = Annotated[Path | None, _option("A text for haystacks (default: generated prose).", "--text")]
TopK = Annotated[int, _option("Keys retrieved per query head.", "--top-k")]
Followup = Annotated[
    str, _option("Whether questions retrieve, as answers do, or attend exactly: retrieve, exact.", "--followup")
]
SeedOption = Annotated[int, _option("Of examples and indexes.", "--seed")]
Threads = Annotated[int | None, _option("CPU threads (default: all cores).", "--threads")]
Device = Annotated[str, _option(f"{', '.join(DEVICES)}.", "--device")]
Dtype = Annotated[str, _option(f"{', '.join(DTYPES)}.", "--dtype")]
Form = Annotated[str, _option("Written to stdout: md, json, csv.", "--output", "-o")]
Out = Annotated[Path | None, _option("Also write the report, as JSON, to this file.", "--out")]
Plot = Annotated[Path | None, _option("Also draw it: .png or .svg.", "--plot")]
Resume = Annotated[bool, _option("Go on with what an interrupted run kept beside --out.", "--resume")]
ScoresOnly = Annotated[
    bool, _option("On stdout only what a second run repeats to the byte: no times, no memory.", "--scores-only")
]


@dataclass(frozen=True)
class Settings:
    """One run. methods: as the user wrote them. options: what is the command's own, as plain data."""

    bench: str
    model: str | None
    contexts: tuple[int, ...]
    methods: tuple[str, ...]
    samples: int
    limit: int | None
    text: str | None
    top_k: int
    followup: str
    seed: int
    threads: int | None
    device: str
    dtype: str
    options: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report and for --resume."""
        plain = {**asdict(self), "contexts": list(self.contexts), "methods": list(self.methods)}
        return {**plain, **plain.pop("options")}


def make_settings(
    bench: str, *, model: str | None, context: str, method: str, samples: int, limit: int | None, text: Path | None,
    top_k: int, followup: str, seed: int, threads: int | None, device: str, dtype: str, **options: Any,
) -> Settings:  # fmt: skip
    """Settings from what the command line gave; ValueError in one line for what cannot be.

    Methods are checked when a model's config is at hand, see `methods.parse_method`.
    """
    names = tuple(dict.fromkeys(part for part in method.replace(" ", "").split(",") if part))
    if not names:
        raise ValueError("--method names no method; give at least one, as in --method full,scan")
    return Settings(
        bench=bench,
        model=model,
        contexts=parse_contexts(context),
        methods=names,
        samples=at_least(samples, 1, "--samples"),
        limit=at_least_if_given(limit, 1, "--limit"),
        text=None if text is None else str(text),
        top_k=at_least(top_k, 1, "--top-k"),
        followup=choose(followup, FOLLOWUPS, "--followup"),
        seed=at_least(seed, 0, "--seed"),
        threads=at_least_if_given(threads, 1, "--threads"),
        device=choose(device, DEVICES, "--device"),
        dtype=choose(dtype, DTYPES, "--dtype"),
        options=options,
    )


def parse_tasks(text: str, allowed: Sequence[str], groups: dict[str, Sequence[str]]) -> list[str]:
    """Tasks from a list of names and groups, each once; ValueError with what comes near to an unknown one."""
    found: list[str] = []
    for name in (part for part in text.replace(" ", "").split(",") if part):
        if name not in allowed and name not in groups:
            every = [*allowed, *groups]
            near = get_close_matches(name, every, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(every)}"
            raise ValueError(f"unknown task {name!r}; {hint}")
        found += groups.get(name, [name])
    if not found:
        raise ValueError(f"--task names no task; choose from {', '.join([*allowed, *groups])}")
    return list(dict.fromkeys(found))
