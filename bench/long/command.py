"""`retrieval-attn bench long`: along a long answer, does it slow down, and does memory grow beyond keys and values?"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import psutil
import torch

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.bench.demo import make_questions
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.options import WholeModel, config_as_dict
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, check_writable, table
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.generate import Request
from retrieval_attn.llm import LLM, load
from retrieval_attn.terminal.options import Fields, option, with_options
from retrieval_attn.terminal.units import parse_length

_COLUMNS = [
    ("answer", "new_tokens", "{:,}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("ms/token p50", "median_ms", "{:.2f}"),
    ("p99", "p99_ms", "{:.2f}"),
    ("worst", "worst_ms", "{:.1f}"),
    ("process MB", "rss_mb", "{:.1f}"),
    ("KV MB", "kv_mb", "{:.1f}"),
    ("index MB", "index_mb", "{:.1f}"),
    ("indexed of far", "indexed", "{:.4f}"),
]


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
    print(table(_COLUMNS, rows))
    print("\n" + verdict(rows))
    if out is not None:
        asked = {**sizes, "prompt": prompt, "model": model.model, **config_as_dict(config, "index", "seed")}
        report = {"schema_version": SCHEMA_VERSION, "env": machine.describe(torch.get_num_threads())}
        out.write_text(json.dumps(report | {"config": asked, "results": rows}, indent=2, allow_nan=False) + "\n")


def measure(llm: LLM, n_prompt: int, n_answer: int, every: int, seed: int) -> Iterator[Row]:
    """A row for every so many tokens of the answer."""
    _, questions = make_questions(llm, n_prompt, 1, seed)
    sampling = Sampling(max_new_tokens=n_answer, temperature=1.0, seed=seed)
    request = Request(llm.model, llm.new_cache(), sampling, stop_ids=())
    steps: list[float] = []
    started = 0.0
    for i, _ in enumerate(request.tokens(questions[0].ids)):
        now = time.perf_counter()
        # The first token waits for the prompt, the second for the index.
        if i >= 2:
            steps.append(now - started)
        if len(steps) == every or (i + 1 == n_answer and steps):
            yield _row(i + 1, steps, request.cache.memories)
            steps.clear()
        started = time.perf_counter()


def _row(n_new: int, steps: list[float], memories: list[LayerMemory]) -> Row:
    ordered = sorted(steps)
    indexes = [memory.far_index.if_built for memory in memories]
    covered = [index.n_keys / memory.split.n_far for index, memory in zip(indexes, memories, strict=True) if index]
    return {
        "new_tokens": n_new,
        "tokens_per_s": len(steps) / sum(steps),
        "median_ms": 1e3 * statistics.median(steps),
        "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        "worst_ms": 1e3 * ordered[-1],
        "rss_mb": psutil.Process().memory_info().rss / 1e6,
        "kv_mb": sum(memory.store.nbytes for memory in memories) / 1e6,
        "index_mb": sum(index.nbytes for index in indexes if index) / 1e6,
        "indexed": statistics.mean(covered) if covered else 0.0,
    }


def verdict(rows: list[Row]) -> str:
    """What became of speed and memory between the first row and the last."""
    if len(rows) < 2:
        return "one row says nothing about growth; ask for more tokens, or for shorter rows"
    first, last = rows[0], rows[-1]
    slower = 100 * (1 - last["tokens_per_s"] / first["tokens_per_s"])
    grown = {name: last[f"{name}_mb"] - first[f"{name}_mb"] for name in ("rss", "kv", "index")}
    return (
        f"tokens per second fell by {slower:.1f} % from the first row to the last; the process grew by "
        f"{grown['rss']:.1f} MB, keys and values by {grown['kv']:.1f} MB, indexes by {grown['index']:.1f} MB"
    )
