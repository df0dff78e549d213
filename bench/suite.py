"""`retrieval-attn bench suite`: every quality benchmark in one run, and their report."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench import quality_options as q
from retrieval_attn.bench.latency_options import parse_contexts
from retrieval_attn.bench.report_format import short


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
        "needle": {"context": grid, "depths": 10},
        "ruler": {"context": at, "task": "all", "samples": 2},
        "scbench": {"context": at, "task": "all", "samples": 1},
        "ppl": {"context": grid},
        "compare": {"context": at, "samples": 2},
        "fidelity": {"context": at},
    }


def command(
    folder: Annotated[Path, typer.Argument(help="Where reports and pictures go; made if it is not there.")],
    context: q.Context = "32k",
    model: q.ModelOption = None,
    limit: Annotated[int | None, q._option("So many examples of each task: a smoke run.", "--limit")] = None,
    seed: q.SeedOption = 0,
    threads: q.Threads = None,
    device: q.Device = "auto",
    resume: q.Resume = False,
) -> None:
    """needle, ruler, scbench, ppl, compare and fidelity, one after the other, then one page about all of them.

    What is done already, in FOLDER, is not done again with --resume. One that fails does not keep the others from
    running; the exit status is 1 then.
    """
    contexts = parse_contexts(context)
    if len(contexts) != 1:
        raise ValueError(f"--context of a suite is one length, got {context!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"FOLDER cannot be made at {str(folder)!r}: {error.strerror}") from error
    common = {"model": model, "seed": seed, "threads": threads, "device": device}
    failures = [
        name for name, asked in _parts(contexts[0], limit).items()
        if not _run(name, folder, {**common, **asked}, resume)
    ]  # fmt: skip
    from retrieval_attn.bench import report

    page = folder / "report.html"
    if _can_draw():
        report.command(results=folder, out=page)
    print(f"reports are in {folder}" + (f"; all of them on one page: {page}" if _can_draw() else ""))
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
        raise typer.Exit(1)


def _run(name: str, folder: Path, asked: dict[str, Any], resume: bool) -> bool:
    """One benchmark, into FOLDER; whether it went well."""
    out = folder / f"{name}.json"
    if resume and out.exists():
        return True
    print(f"\n## {name}\n", flush=True)
    words = [word for key, value in asked.items() if value is not None for word in (f"--{key}", str(value))]
    words += ["--out", str(out), *(["--plot", str(out.with_suffix(".png"))] if _can_draw() else [])]
    words += ["--resume"] if resume else []
    started = time.perf_counter()
    try:
        status = _call(name, words)
    except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    print(f"\n{name}: {time.perf_counter() - started:.0f} s ({shlex.join(['bench', name, *words])})", file=sys.stderr)
    return status == 0


def _call(name: str, words: list[str]) -> int:
    """A benchmark's command in this process, as if its words were on the command line; its exit status."""
    from importlib import import_module

    app = typer.Typer(add_completion=False)
    run: Callable[..., Any] = import_module(f"retrieval_attn.bench.{name}").command
    app.command(name)(run)
    try:
        app(words, standalone_mode=False)
    except typer.Exit as leaving:
        return leaving.exit_code
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def _can_draw() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
