"""Contexts of `bench memory`, each measured by a fresh process."""

import json
import os
import subprocess
import sys
from typing import Any

from retrieval_attn.bench.shared.report import SCHEMA_VERSION, Row, short


def run_context(asked: dict[str, Any]) -> Row:
    """The row of one context, measured by a fresh process; one that fails has status "failed" and a reason."""
    row = {"context": short(asked["tokens"]), "index": asked["index"], "status": "failed", "reason": ""}
    words = [sys.executable, "-m", "retrieval_attn.bench.memory.one_context", json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return {**row, "reason": said[-1]}
    return {**row, "status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}


def as_report(rows: list[Row], asked: dict[str, Any]) -> dict[str, Any]:
    """Plain data: {schema_version, bench, env, config, results}."""
    import torch

    from retrieval_attn.bench.shared import machine

    env = machine.describe(torch.get_num_threads())
    return {"schema_version": SCHEMA_VERSION, "bench": "memory", "env": env, "config": asked, "results": rows}
