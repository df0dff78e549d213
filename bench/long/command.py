"""`retrieval-attn bench long`: along a long answer, does it slow down, and does memory grow beyond keys and values?"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.bench.demo import make_questions
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.options import DEVICES, at_least, choose, parse_contexts
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, check_writable, table
from retrieval_attn.config import INDEX_KINDS, RetrievalConfig, Sampling
from retrieval_attn.generate import Request
from retrieval_attn.llm import LLM, load

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


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


def command(
    prompt: Annotated[str, _option("Tokens of the prompt; k = 1024.", "--prompt")] = "32k",
    tokens: Annotated[int, _option("Tokens of the answer; its end is ignored.", "--tokens")] = 20_000,
    every: Annotated[int, _option("Tokens per row of the table.", "--every")] = 2_000,
    model: Annotated[str | None, _option("A folder or hub id (default: the embedded model).", "--model", "-m")] = None,
    index: Annotated[str, _option(f"One of {', '.join(INDEX_KINDS)}.", "--index")] = "graph",
    device: Annotated[str, _option(f"{', '.join(DEVICES)}.", "--device")] = "auto",
    seed: Annotated[int, _option("Of the document, the drawn tokens and the index.", "--seed")] = 0,
    out: Annotated[Path | None, _option("Also write rows and machine to this .json file.", "-o", "--out")] = None,
) -> None:
    """Speed and memory along a long answer. Tokens are drawn at temperature 1, or a small model repeats itself."""
    lengths = parse_contexts(prompt)
    choose(index, INDEX_KINDS, "--index")
    choose(device, DEVICES, "--device")
    at_least(tokens, 1, "--tokens")
    at_least(every, 1, "--every")
    if out is not None:
        check_writable(out, "--out")
    llm = load(model, RetrievalConfig(index=index, seed=seed), device=device)
    rows = list(measure(llm, lengths[0], tokens, every, seed))
    print(table(_COLUMNS, rows))
    print("\n" + verdict(rows))
    if out is not None:
        config = {"prompt": prompt, "tokens": tokens, "every": every, "model": model, "index": index, "seed": seed}
        report = {"schema_version": SCHEMA_VERSION, "env": machine.describe(torch.get_num_threads())}
        out.write_text(json.dumps(report | {"config": config, "results": rows}, indent=2, allow_nan=False) + "\n")


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
