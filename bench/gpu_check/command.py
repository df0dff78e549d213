"""`retrieval-attn bench gpu-check`: everything that wants a GPU, in one command."""

import json
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from retrieval_attn.bench.shared.options import at_least
from retrieval_attn.bench.shared.report import as_json, check_writable, results_folder
from retrieval_attn.terminal.options import option, with_options

WHERE = "gpu-check-DEVICE.json in bench/results of a checkout, else here"


@with_options
def command(
    minutes: Annotated[float, option("Time for everything.", "--minutes")] = 8.0,
    seed: Annotated[int, option("Of data and weights.", "--seed")] = 0,
    dry_run: Annotated[bool, option("Rehearse on the CPU: tiny shapes, idle numbers.", "--dry-run")] = False,
    out: Annotated[Path | None, option("Write the rows to this .json file.", "-o", "--out", default=WHERE)] = None,
) -> None:
    """Check and time every kernel on this machine's GPU.

    Correctness of every kernel and of streamed prefill; a model of the shape of Llama 3 8B with 128K and 512K tokens in
    24 and 16 GiB, and its prefill without a cap; times of prefill beside dense attention. It always ends: each part has
    its share of --minutes, and what does not fit is skipped by name. The exit status is 1 if a kernel is wrong or a
    measurement failed.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be more than 0, got {minutes}")
    at_least(seed, 0, "--seed")
    device = _device(minutes, dry_run)
    if out is None and not dry_run:
        out = default_out(results_folder(), device)
    if out is not None:
        check_writable(out, "--out")
    from retrieval_attn.bench.gpu_check import measure as gpu_measure

    sizes, where = (gpu_measure.TINY, "cpu") if dry_run else (gpu_measure.BIG, "cuda")
    report = gpu_measure.run(sizes, where, minutes, seed)
    if out is not None:
        out.write_text(as_json(report, indent=1))
        print(f"written to {out}")
    print(json.dumps(report["results"], allow_nan=False))
    if any(row["status"] == "failed" for row in report["results"]):
        raise typer.Exit(1)


def _device(minutes: float, dry_run: bool) -> str:
    """The name of the device to check. Raises ValueError, saying what would be done, where there is none."""
    import torch

    if dry_run:
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device here: this would check every Triton kernel, hold a random 8B model with 128K and 512K "
            f"tokens in 24 GiB, and time prefill from 8K to 1M tokens, in {minutes:g} minutes; --dry-run rehearses on "
            "the CPU"
        )
    return torch.cuda.get_device_name()


def default_out(folder: Path, device: str) -> Path:
    """A file for each kind of device: that of an "NVIDIA GeForce RTX 4090" ends in nvidia-geforce-rtx-4090.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"gpu-check-{slug}.json"
