"""`retrieval-attn bench memory`: the peak of every phase beside what `retrieval-attn estimate` says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_attn.bench.shared.options import Context, WholeModel, config_as_dict
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, check_writable, short, table
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, option, with_options
from retrieval_attn.terminal.units import parse_lengths

CONFIG_FIELDS = ("index", "seed", "threads")

PHASES = ("load", "prefill", "build", "decode", "save", "restore")

_PEAKS = [
    ("context", "context", "{}"),
    ("index", "index", "{}"),
    ("phase", "phase", "{}"),
    ("planned MiB", "planned_host", "MiB"),
    ("measured MiB", "measured_host", "MiB"),
    ("ratio", "host_ratio", "{:.3f}"),
    ("device planned MiB", "planned_device", "MiB"),
    ("device measured MiB", "measured_device", "MiB"),
    ("device ratio", "device_ratio", "{:.3f}"),
]
_TIMES = [
    ("context", "context", "{}"),
    ("index", "index", "{}"),
    ("tokens", "tokens", "{:,}"),
    ("TTFT s", "ttft_s", "{:.2f}"),
    ("prefill s", "prefill_s", "{:.2f}"),
    ("build s", "build_s", "{:.2f}"),
    ("second question s", "second_question_s", "{:.3f}"),
    ("% of TTFT", "second_pct", "{:.2f}"),
    ("save s", "save_s", "{:.2f}"),
    ("restore s", "restore_s", "{:.2f}"),
    ("first token after restore s", "first_token_after_restore_s", "{:.2f}"),
    ("right", "right", "{}"),
]


@with_options
def command(
    model: Annotated[WholeModel, Fields("model", "device")],
    config: Annotated[RetrievalConfig, Fields(*CONFIG_FIELDS)],
    context: Context = "8k,32k",
    save: Annotated[
        Path | None, option("A folder to save sessions in meanwhile, on the disk to measure.", "--save")
    ] = None,
    out: Annotated[
        Path | None, option("Also write the rows, with the machine, to this .json file.", "-o", "--out")
    ] = None,
) -> None:
    """Peak memory of every phase beside the plan, and the times of a session: read, ask, save, restore, ask again.

    Each context has a process of its own. One that fails is a row that says why.
    """
    contexts = parse_lengths(context, "--context")
    if save is not None and not save.is_dir():
        raise ValueError(f"--save must be a folder that exists, got {str(save)!r}")
    if out is not None:
        check_writable(out, "--out")
    where = {"model": model.model, "device": model.device, "save": None if save is None else str(save)}
    asked = {**where, **config_as_dict(config, *CONFIG_FIELDS)}
    rows = []
    for n_tokens in contexts:
        rows.append(run_context({"tokens": n_tokens, **asked}))
        print(f"{short(n_tokens)}: {rows[-1]['status']} {rows[-1]['reason']}", file=sys.stderr, flush=True)
    print(as_text(rows))
    if out is not None:
        out.write_text(json.dumps(as_report(rows, asked), indent=2, allow_nan=False) + "\n")
    if not any(row["status"] == "ok" for row in rows):
        raise typer.Exit(1)


def run_context(asked: dict[str, Any]) -> Row:
    """The row of one context, measured by a fresh process; one that fails has status "failed" and a reason."""
    row = {"context": short(asked["tokens"]), "index": asked["index"], "status": "failed", "reason": ""}
    words = [sys.executable, "-m", "retrieval_attn.bench.memory.measure", json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return {**row, "reason": said[-1]}
    return {**row, "status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}


def as_report(rows: list[Row], asked: dict[str, Any]) -> dict[str, Any]:
    """Plain data: {schema_version, env, config, results}."""
    import torch

    from retrieval_attn.bench.shared import machine

    env = machine.describe(torch.get_num_threads())
    return {"schema_version": SCHEMA_VERSION, "env": env, "config": asked, "results": rows}


def as_text(rows: list[Row]) -> str:
    """Two Markdown tables, peaks and times, and a line for every context that failed."""
    good = [row for row in rows if row["status"] == "ok"]
    failed = [f"- {row['context']} {row['index']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    parts = []
    if good:
        parts = [table(_PEAKS, [line for row in good for line in peak_lines(row)]), table(_TIMES, _time_lines(good))]
        if not all(row["exact_peaks"] for row in good):
            parts.append("- this system cannot begin a peak anew: a phase shows the highest of all phases before it")
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def peak_lines(row: Row) -> list[Row]:
    """A line for every phase, planned, measured, and their ratio; then one for the highest of all."""
    lines = [_peak_line(row, name, row["planned"][name], row["measured"][name]) for name in PHASES]
    highest = [{where: max(row[side][name][where] for name in PHASES) for where in ("host", "device")} for side in
               ("planned", "measured")]  # fmt: skip
    return [*lines, _peak_line(row, "peak", *highest)]


def _peak_line(row: Row, phase: str, planned: dict[str, Any], measured: dict[str, Any]) -> Row:
    line = {"context": row["context"], "index": row["index"], "phase": phase}
    for where in ("host", "device"):
        known = planned[where] > 0
        line[f"planned_{where}"] = planned[where] if known else None
        line[f"measured_{where}"] = measured[where] if known else None
        line[f"{where}_ratio"] = measured[where] / planned[where] if known else None
    return line


def _time_lines(rows: list[Row]) -> list[Row]:
    return [
        {
            **row,
            "second_pct": 100 * row["second_question_s"] / row["ttft_s"],
            "right": f"{row['answers_right']} of {row['answers']}",
        }
        for row in rows
    ]
