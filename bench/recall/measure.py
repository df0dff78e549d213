"""Runs of `bench recall`: every source, context and seed, and the methods over each."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import faiss
import torch

from retrieval_attn.bench.recall.format import blank_row, summary
from retrieval_attn.bench.recall.ladders import RULE
from retrieval_attn.bench.recall.measure_layer import measure_layer
from retrieval_attn.bench.recall.options import Options
from retrieval_attn.bench.recall.sources import Sources
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.bars import Status
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.machine import machine_note
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, short
from retrieval_attn.threads.pool import set_threads


def run(options: Options, shown: bool = False) -> dict[str, Any]:
    """Measure everything; returns {schema_version, bench, env, config, sources, results, summary, notes, interrupted}.

    sources: properties of the vectors, by source, context and seed; see `bench.vectors.measure`. Plain data. What
    fails is a row; Ctrl-C returns what there is, with `interrupted` true.
    """
    env = machine.describe(_use_threads(options.threads))
    rows: list[Row] = []
    properties: dict[str, dict[str, float]] = {}
    interrupted = False
    with Status(shown) as status:
        try:
            for row in _rows(options, properties, status):
                rows.append(row)
                status.finished(_finished(row))
        except KeyboardInterrupt:
            interrupted = True
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": "recall",
        "env": env,
        "config": {**options.as_dict(), "mode": "recall"},
        "sources": properties,
        "results": rows,
        "summary": summary(rows, options.estimators),
        "notes": _notes(options, env, interrupted),
        "interrupted": interrupted,
    }


def _use_threads(threads: int | None) -> int:
    """Let PyTorch, numba and faiss use as many threads, all cores by default; returns how many."""

    if threads is not None:
        torch.set_num_threads(threads)
    used = torch.get_num_threads()
    set_threads(used)
    faiss.omp_set_num_threads(used)
    return used


def _rows(options: Options, properties: dict[str, dict[str, float]], status: Status) -> Iterator[Row]:
    """Every row; the properties of each source are added as it comes up."""

    blank = functools.partial(blank_row, options.top_k)
    sources = Sources(options, status.doing)
    for context, seed, source in itertools.product(options.contexts, options.seeds, options.sources):
        known = {"source": source, "context": context, "seed": seed, "method": "vectors"}
        try:
            names = sources.layers(source, context, seed)
        except (*FAILURES, OSError) as error:
            yield fail(blank(**known), error)
            continue
        for name in names:
            status.doing(f"{name}, {context} keys, seed {seed}: vectors")
            try:
                layer, found = sources.layer(name, context, seed)
            except (*FAILURES, OSError) as error:
                yield fail(blank(**{**known, "source": name}), error)
                continue
            properties[f"{name} {short(context)} seed {seed}"] = found
            yield from measure_layer(options, layer, blank, status.doing)


def _finished(row: Row) -> str:
    """What became of one row, for a log."""
    said = row["reason"] if row["status"] != "ok" else _numbers(row)
    where = f"{row['source']} {short(row['context'])} seed {row['seed']} {row['method']}"
    effort = "" if row["effort"] is None else f" {row['effort']}"
    return f"{where}{effort}: {row['status']}, {said}"


def _numbers(row: Row) -> str:
    if row["search_us"] is None:
        return f"{row['step_topk_us']:.0f} us per step"
    return f"recall {row['recall']:.3f}, {row['visited_pct']:.2f} % visited, {row['search_us']:.0f} us"


def _notes(options: Options, env: dict[str, Any], interrupted: bool) -> list[str]:
    """The foot of the table: what was measured, on what."""

    swept = 2 * env["last_level_cache_bytes"] / 2**20
    notes = [
        machine_note(env),
        f"one step of one layer: a query per head of {options.queries} held-out ones, median; search us is the search "
        "alone, step us the search that the estimator needs and the attention over what it found",
        f"caches are cold: {swept:.0f} MiB of other memory are read and written before each step",
        "error: relative L2 distance from float32 attention over all keys, a mean over heads and queries; topk, lift "
        f"and tail attend to {options.top_k} keys per head, topk-group and tail-group to what the whole group found",
        "recall: keys whose score is that of the k-th best, within rounding, count; mass: of the softmax over all keys",
        RULE,
    ]
    if not options.check:
        notes.append("hits were not checked: do not quote these numbers")
    if interrupted:
        notes.append("interrupted: rows are missing")
    return notes
