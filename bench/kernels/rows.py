"""Rows of the table of kernels: how they are filled in, the same for all kernels."""

from typing import NamedTuple

import numpy as np

from retrieval_attn.bench.shared.report import Row

# The whole prompt in one call, a method apart.
SQUARE = "sdpa, one call"

# Methods that leave nothing out.
DENSE = ("sdpa", "dense", "flex", SQUARE)

# CSV: one column per plain value of a row, in this order; raw samples are in the JSON only.
ROW_FIELDS = (
    "part", "context", "method", "status", "reason", "check", "total_ms", "total_p20_ms", "total_p80_ms", "repeats",
    "speedup_vs_sdpa", "speedup_vs_best_dense", "tflop_per_s", "peak_share", "gb_per_s",
    "bandwidth_share", "density", "mass", "rel_error", "chunk", "places",
)  # fmt: skip


class Limits(NamedTuple):
    """What the device can do, measured: operations per second of a matrix product, bytes per second of a copy."""

    flops: float
    bandwidth: float


def blank_row(context: int, method: str, part: str = "prefill") -> Row:
    """A row with every field, unmeasured. part: "prefill" or "decode"."""
    known = {"context": context, "method": method, "part": part, "status": "failed", "samples": {}}
    return {**dict.fromkeys(ROW_FIELDS), **known}


def set_times(row: Row, times: list[float]) -> None:
    """Median and percentiles of seconds, as milliseconds."""
    row["total_ms"] = 1e3 * float(np.median(times))
    row["total_p20_ms"], row["total_p80_ms"] = (1e3 * np.percentile(times, [20, 80])).tolist()
    row["repeats"] = len(times)


def set_shares(row: Row, limits: Limits, flops: float, n_bytes: float) -> None:
    """How far from what the device can do: of its operations and of its bytes per second."""
    taken = row["total_ms"] / 1e3
    row["tflop_per_s"], row["peak_share"] = flops / taken / 1e12, flops / taken / limits.flops
    row["gb_per_s"], row["bandwidth_share"] = n_bytes / taken / 1e9, n_bytes / taken / limits.bandwidth


def set_check(row: Row, problem: str | None) -> None:
    """A number needs a passing check."""
    row["status"], row["check"] = ("failed", "failed") if problem else ("ok", "passed")
    row["reason"] = problem


def compare(rows: list[Row]) -> None:
    """Fill in how many times as fast as sdpa, and as the fastest dense method, prefill of the same length is."""
    done = [row for row in rows if row["status"] == "ok" and row["part"] == "prefill"]
    for row in done:
        rivals = {r["method"]: r["total_ms"] for r in done if r["context"] == row["context"] and r["method"] in DENSE}
        if "sdpa" in rivals:
            row["speedup_vs_sdpa"] = rivals["sdpa"] / row["total_ms"]
        if rivals:
            row["speedup_vs_best_dense"] = min(rivals.values()) / row["total_ms"]
