"""`retrieval-attn bench suite`: every quality benchmark in one run, and their report."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.shared.options import Context, WholeModel
from retrieval_attn.bench.shared.pictures import can_draw
from retrieval_attn.bench.shared.report import short
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, option, with_options
from retrieval_attn.terminal.units import parse_lengths

# What a command that Ctrl-C ended leaves behind.
INTERRUPTED = 130


def _parts(context: int, limit: int | None) -> dict[str, dict[str, Any]]:
    """What each benchmark is asked for. Sizes are such that 32K tokens take two cores less than half an hour."""
    at, grid = short(context), f"{short(max(1, context // 4))},{short(context)}"
    if limit is not None:
        few = {"samples": limit, "limit": limit, "method": "full,scan,streaming"}
        return {
            "needle": {"context": grid, "depths": limit, **few},
            "ruler": {"context": at, "task": "niah_single_1,niah_multikey_2,vt,cwe,fwe", **few},
            "scbench": {"context": at, "task": "kv_short,mf,many_shot,mix_passkey", **few},
            "ppl": {"context": grid, "limit": limit},
            "compare": {"context": at, "samples": limit, "limit": limit},
            "fidelity": {"context": at, "limit": limit},
        }
    return {
        "needle": {"context": grid, "depths": 10, "together": ""},
        "ruler": {"context": at, "task": "all", "samples": 1},
        "scbench": {"context": at, "task": "all", "samples": 1},
        "ppl": {"context": grid},
        "compare": {"context": at, "samples": 1},
        "fidelity": {"context": at},
    }


@with_options
def command(
    model: Annotated[WholeModel, Fields("model", "device")],
    config: Annotated[RetrievalConfig, Fields("seed", "threads", rest=False)],
    folder: Annotated[Path, typer.Argument(help="Where reports and pictures go; made if it is not there.")],
    context: Context = "32k",
    limit: Annotated[int | None, option("So many examples of each task: a smoke run.", "--limit")] = None,
    resume: Annotated[bool, option("Leave out what is in FOLDER already.", "--resume")] = False,
) -> None:
    """needle, ruler, scbench, ppl, compare and fidelity, one after the other, then one page about all of them.

    What is done already, in FOLDER, is not done again with --resume. One that fails does not keep the others from
    running; the exit status is 1 then.
    """
    contexts = parse_lengths(context, "--context")
    if len(contexts) != 1:
        raise ValueError(f"--context of a suite is one length, got {context!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"FOLDER cannot be made at {str(folder)!r}: {error.strerror}") from error
    common = {"model": model.model, "seed": config.seed, "threads": config.threads, "device": model.device}
    failures = [
        name
        for name, asked in _parts(contexts[0], limit).items()
        if not _run(name, folder, {**common, **asked}, resume)
    ]
    from retrieval_attn.bench.report import command as report

    page = folder / "report.html"
    report.command(results=folder, out=page)
    print(f"reports are in {folder}; all of them on one page: {page}")
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
        raise typer.Exit(1)


def _run(name: str, folder: Path, asked: dict[str, Any], resume: bool) -> bool:
    """One benchmark, into FOLDER; whether it went well. Ctrl-C ends it, and what would come after."""
    out = folder / f"{name}.json"
    if resume and out.exists():
        return _was_asked(out, asked)
    print(f"\n## {name}\n", flush=True)
    # Flags have no value.
    words = [word for key, value in asked.items() if value is not None for word in (f"--{key}", str(value)) if word]
    words += ["--out", str(out), *(["--plot", str(out.with_suffix(".png"))] if can_draw() else [])]
    words += ["--resume"] if resume else []
    started = time.perf_counter()
    try:
        status = _call(name, words)
    except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    print(f"\n{name}: {time.perf_counter() - started:.0f} s ({shlex.join(['bench', name, *words])})", file=sys.stderr)
    return status == 0


def _was_asked(out: Path, asked: dict[str, Any]) -> bool:
    """Whether a report that is there went well; ValueError if it was made with other settings than are asked now."""
    report = json.loads(out.read_text())
    config = report.get("config", {})
    wanted = {**asked, "contexts": list(parse_lengths(asked["context"], "--context"))}
    for key in ("model", "seed", "contexts", "samples", "limit", "depths"):
        if key in wanted and key in config and config[key] != wanted[key]:
            raise ValueError(
                f"--resume: {key} was {config[key]!r} in {out} and is {wanted[key]!r} now; ask for the same, or name "
                "another folder"
            )
    return any(row["status"] == "ok" for row in report["results"])


def _call(name: str, words: list[str]) -> int:
    """A benchmark's command in this process, as if its words were on the command line; its exit status."""
    app = typer.Typer(add_completion=False)
    run: Callable[..., Any] = import_module(f"retrieval_attn.bench.{name}.command").command
    app.command(name)(run)
    try:
        status = app(words, standalone_mode=False) or 0
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return int(status)
