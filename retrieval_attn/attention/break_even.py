"""From which length on sparse prefill pays: measured once per device, then kept in the user's cache folder."""

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from retrieval_attn.kernels import attend_adaptive, attend_dense
from retrieval_attn.kernels.sparse.near_best import is_quick

log = logging.getLogger("retrieval_attn")

# Shorter than this is never sparse: there is little to win, and exactness is worth something.
LEAST = 8192

# Queries of the chunk that is timed, and the numbers of keys it is timed at; times grow linearly between and beyond.
QUERIES, LENGTHS = 2048, (4096, 16384)

# Share of the keys that a sparse head is taken to read; at 128K, XAttention reports a third of it.
DENSITY = 0.2

# Where the answer is "never": longer than any context.
NEVER = 1 << 40


@functools.cache
def break_even(n_heads: int, n_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens from which on sparse attention is faster than dense on this device; at least `LEAST`.

    Read from the cache file if this device, PyTorch and shape were measured before, else measured in a few seconds.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    key = f"{name}; torch {torch.__version__}; {dtype}; {n_heads}/{n_kv_heads} heads of {dim}"
    known = _read()
    if key not in known:
        known[key] = measure(n_heads, n_kv_heads, dim, dtype, device)
        log.info("sparse prefill pays from %d tokens on: %s", known[key], key)
        _keep(key, known[key])
    return max(LEAST, known[key])


def cache_file() -> Path:
    """Where measurements are kept; deleting it measures anew."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "retrieval-attn" / "prefill.json"


def measure(n_heads: int, n_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens at which the times of the two cross, by one group of heads (all of them on a GPU, which one would not
    fill)."""
    groups = n_kv_heads if device.type == "cuda" else 1
    heads = groups * (n_heads // n_kv_heads)
    lead = []
    for n_keys in LENGTHS:
        inputs = wanting_some(heads, groups, n_keys, dim, dtype, device)
        dense = functools.partial(attend_dense, *inputs, causal=True)
        sparse = functools.partial(attend_adaptive, *inputs, mass=0.9, kinds=dearest(device))
        lead.append(_seconds(dense, device) - _seconds(sparse, device))
    return crossing(LENGTHS, (lead[0], lead[1]))


def dearest(device: torch.device) -> tuple[str, ...]:
    """Patterns to choose from, such that `wanting_some` is served by the one that takes longest to choose."""
    return ("a_shape", "block_sparse", "near_best") if device.type == "cpu" and is_quick() else ("vertical_slash",)


def wanting_some(
    heads: int, groups: int, n_keys: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, float]:
    """query, keys, values and scale: noise, but for one key in `1 / DENSITY`, which every query wants."""
    make = torch.Generator(device).manual_seed(n_keys)
    shapes = (1, heads, QUERIES, dim), (1, groups, n_keys, dim), (1, groups, n_keys, dim)
    query, keys, values = (0.1 * torch.randn(shape, generator=make, device=device) for shape in shapes)
    query[..., 0] = 4 * dim**0.25
    keys[:, :, :: int(1 / DENSITY), 0] = 4 * dim**0.25
    return query.to(dtype), keys.to(dtype), values.to(dtype), dim**-0.5


def crossing(lengths: tuple[int, int], lead: tuple[float, float]) -> int:
    """Where the line through two points (length, seconds by which dense is slower) crosses 0; `NEVER` if it falls."""
    slope = (lead[1] - lead[0]) / (lengths[1] - lengths[0])
    if slope <= 0:
        return NEVER if lead[1] <= 0 else 0
    return max(0, min(NEVER, int(lengths[0] - lead[0] / slope)))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The best of two, after one to warm up."""
    best = float("inf")
    for i in range(3):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started) if i else best
    return best


def _read() -> dict[str, int]:
    try:
        known = json.loads(cache_file().read_text())
        return {str(key): int(tokens) for key, tokens in known.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        log.warning("%s cannot be read and will be measured anew: %s", cache_file(), error)
        return {}


def _keep(key: str, tokens: int) -> None:
    """Add an entry to what the file holds by now: other processes write to it, too."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as part:
            json.dump(_read() | {key: tokens}, part, indent=1)
        os.replace(part.name, path)
    except OSError as error:
        log.warning("what was measured cannot be kept in %s and will be measured again: %s", path, error)
