"""`retrieval-attn bench memory`: the peak of every phase beside what `retrieval-attn estimate` says of it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from retrieval_attn.bench.memory.format import as_text
from retrieval_attn.bench.memory.measure import as_report, run_context
from retrieval_attn.bench.shared.options import Context, WholeModel, config_as_dict
from retrieval_attn.bench.shared.report import check_writable, short
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.terminal.options import Fields, option, with_options
from retrieval_attn.terminal.units import parse_lengths

CONFIG_FIELDS = ("index", "seed", "threads")


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
