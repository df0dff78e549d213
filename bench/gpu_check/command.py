"""Everything that wants a GPU, in one command: `python bench/gpu_check/command.py`.

Correctness of every kernel and of streamed prefill; a model of the shape of Llama 3 8B with 128K and 512K tokens in 24
and 16 GiB, and its prefill without a cap; times of prefill beside dense attention. Rows go to bench/results/. It always
ends: each part has its share of --minutes, and what does not fit is skipped by name. `--dry-run` goes the same way on a
CPU, with tiny shapes and numbers that mean nothing.
"""

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all is right, 1 if a kernel is wrong or a measurement failed, 2 if it cannot begin."""
    options = _parser().parse_args(arguments)
    _leave_folder()
    import torch

    from retrieval_attn.bench.gpu_check import run as gpu_run
    from retrieval_attn.bench.shared.report import check_writable

    if not (options.dry_run or torch.cuda.is_available()):
        print(_without_device(options.minutes), file=sys.stderr)
        return 2
    sizes, device = (gpu_run.TINY, "cpu") if options.dry_run else (gpu_run.BIG, "cuda")
    out: Path | None = options.output
    if out is None and not options.dry_run:
        out = RESULTS / f"gpu-check-{slug(torch.cuda.get_device_name())}.json"
    if out is not None:
        try:
            check_writable(out, "--output")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    report = gpu_run.run(sizes, device, options.minutes, options.seed)
    if out is not None:
        out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"written to {out}")
    print(json.dumps(report["results"], allow_nan=False))
    return int(any(row["status"] == "failed" for row in report["results"]))


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA GeForce RTX 4090" is nvidia-geforce-rtx-4090."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _leave_folder() -> None:
    """A script's folder comes first where modules are looked for; its kernels.py would pass for the package `kernels`
    that transformers asks for."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != here]


def _without_device(minutes: float) -> str:
    return (
        "no CUDA device here: this would check every Triton kernel, hold a random 8B model with 128K and 512K tokens "
        f"in 24 GiB, and time prefill from 8K to 1M tokens, in {minutes:g} minutes; --dry-run rehearses on the CPU"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check and time every kernel on this machine's GPU.")
    where = "JSON file of the rows (default: bench/results/gpu-check-<device>.json)"
    parser.add_argument("-o", "--output", type=Path, help=where)
    parser.add_argument("--minutes", type=_positive, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny shapes")
    return parser


def _positive(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
