"""`retrieval-attn bench long`: along a long answer, does it slow down, and does memory grow beyond keys and values?"""

import json
from pathlib import Path
from typing import Annotated

import torch

from retrieval_attn.bench.long.format import COLUMNS, verdict
from retrieval_attn.bench.long.measure import measure
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.options import WholeModel, config_as_dict
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, check_writable, table
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.llm import load
from retrieval_attn.terminal.options import Fields, option, with_options
from retrieval_attn.terminal.units import parse_length


@with_options
def command(
    model: Annotated[WholeModel, Fields("model", "device")],
    config: Annotated[RetrievalConfig, Fields("index", "seed", "threads")],
    prompt: Annotated[str, option("Tokens of the prompt; k = 1024.", "--prompt")] = "32k",
    tokens: Annotated[str, option("Tokens of the answer; its end is ignored.", "--tokens")] = "20000",
    every: Annotated[str, option("Tokens per row of the table.", "--every")] = "2000",
    out: Annotated[Path | None, option("Also write rows and machine to this .json file.", "-o", "--out")] = None,
) -> None:
    """Speed and memory along a long answer. Tokens are drawn at temperature 1, or a small model repeats itself."""
    flags = {"prompt": prompt, "tokens": tokens, "every": every}
    sizes = {name: parse_length(text, f"--{name}") for name, text in flags.items()}
    if out is not None:
        check_writable(out, "--out")
    llm = load(model.model, config, device=model.device)
    rows = list(measure(llm, sizes["prompt"], sizes["tokens"], sizes["every"], config.seed))
    print(table(COLUMNS, rows))
    print("\n" + verdict(rows))
    if out is not None:
        asked = {**sizes, "prompt": prompt, "model": model.model, **config_as_dict(config, "index", "seed")}
        env = machine.describe(torch.get_num_threads())
        report = {"schema_version": SCHEMA_VERSION, "bench": "long", "env": env, "config": asked, "results": rows}
        out.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
