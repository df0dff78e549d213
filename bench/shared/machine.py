"""The machine a number was measured on: what it is, how fast its memory is, and how much of it a run took."""

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "numpy", "numba", "faiss-cpu", "triton")

# Instruction sets that decide which kernel runs.
ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16")

_CACHE_LEVEL_3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

# What is assumed where the system does not tell.
_DEFAULT_CACHE = 32 * 2**20


def describe(threads: int) -> dict[str, Any]:
    """Everything that a reader of a number wants to know of where it comes from; plain data."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "isa": [name for name in ISA if name in _cpu_flags()],
        "last_level_cache_bytes": cache_bytes(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": threads,
        # Two pools of threads share the cores, PyTorch's and numba's; how they wait for work shows in every number.
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpu_driver": _driver() if torch.cuda.is_available() else None,
    }


def machine_note(env: dict[str, Any]) -> str:
    """The machine, the versions and the commit, from what `machine.describe` said; one line."""
    git = env["git"]
    commit = (git["commit"] or "no commit")[:12] + (", changed files" if git["dirty"] else "")
    versions = ", ".join(f"{name} {v}" for name, v in env["packages"].items() if v)
    load = env["load_average"]
    return (
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads (waiting: "
        f"{env['omp_wait_policy'] or 'default'}; {', '.join(env['isa'])}); {versions}; "
        f"{commit}; {env['date']}" + (f"; load average {load:.1f} at the start" if load is not None else "")
    )


def device_note(env: dict[str, Any], device: str) -> str:
    """The device that was measured, in a few words."""
    return env["gpu"] if device.startswith("cuda") else f"{env['cpu']}, {env['threads']} threads"


def git_state() -> dict[str, Any]:
    """The commit this code is from, and whether files were changed since; nulls outside a repository."""
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain")
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def cache_bytes() -> int:
    """Bytes of the last-level cache of one core's neighbourhood."""
    try:
        text = _CACHE_LEVEL_3.read_text().strip()
    except OSError:
        return _DEFAULT_CACHE
    units = {"K": 2**10, "M": 2**20}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def prepare(device: str, threads: int | None) -> tuple[str, int]:
    """The device that "auto" stands for, and the threads in use from now on, in PyTorch and numba alike.

    Raises ValueError for CUDA without a CUDA device.
    """
    import torch

    from retrieval_attn.threads.pool import set_threads

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and found == "cpu":
        raise ValueError("--device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu or auto")
    if threads is not None:
        torch.set_num_threads(threads)
        set_threads(threads)
    return found if device == "auto" else device, torch.get_num_threads()


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy moves on the device, reads and writes together; the best of a few."""
    import torch

    n_bytes = min(2**28, psutil.virtual_memory().available // 8)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / copy_seconds(source, target)


def copy_seconds(source: Any, target: Any) -> float:
    """Seconds that copying one tensor to another takes; the best of a few."""
    best = float("inf")
    for _ in range(5):
        synchronize(str(target.device))
        started = time.perf_counter()
        target.copy_(source)
        synchronize(str(target.device))
        best = min(best, time.perf_counter() - started)
    return best


def synchronize(device: str) -> None:
    """Wait for the device's work; nothing to do on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


class PeakMemory:
    """Inside: samples this process's memory; `rss` and `device` hold the largest bytes seen. May be entered again."""

    def __init__(self, device: str, every: float = 0.02) -> None:
        self.rss = 0
        self.device = 0
        self._on, self._every = device, every
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._stop.clear()
        self.rss = max(self.rss, self._process.memory_info().rss)
        if self._on.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self._on)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._on.startswith("cuda"):
            import torch

            self.device = max(self.device, torch.cuda.max_memory_allocated(self._on))

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.rss = max(self.rss, self._process.memory_info().rss)


def require_memory(n_bytes: int, what: str) -> None:
    """Raise MemoryError, with the numbers, if `what` does not fit into free memory, before the system kills us."""
    free = psutil.virtual_memory().available
    if n_bytes > 0.95 * free:
        raise MemoryError(f"{what} takes {n_bytes / 2**30:.1f} GiB of CPU memory, {free / 2**30:.1f} GiB are free")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    lists = [line.split(":", 1)[1].split() for line in _cpu_lines() if line.startswith(("flags", "Features"))]
    return set(lists[0]) if lists else set()


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None
