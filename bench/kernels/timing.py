"""How long something takes on a device, and how fast that device can compute."""

import time
from collections.abc import Callable

import torch

# Edge of the matrices whose product tells how fast a device computes.
_EDGE = {"cpu": 2048, "cuda": 8192}

_TRIES = 5


def seconds(run: Callable[[], object], device: str, n: int = 1) -> float:
    """Mean seconds of n calls in a row; on a GPU from when it reaches the first to when it has done the last."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        for _ in range(n):
            run()
        return (time.perf_counter() - started) / n
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(n):
        run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3 / n


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product; the best of a few, after one to warm up.

    float32 is multiplied as such, never in shorter formats.
    """
    edge = _EDGE[torch.device(device).type]
    x = torch.randn((edge, edge), device=device).to(dtype)
    best = min([seconds(lambda: x @ x, device) for _ in range(1 + _TRIES)][1:])
    return 2 * edge**3 / best
