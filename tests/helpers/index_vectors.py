"""Attention-like vectors for the index tests, and proof that they have what makes attention hard.

Gaussian queries would hide every retrieval bug: here keys share a mean, fill few directions, turn with their position,
contain heavy hitters, and queries come from elsewhere."""

from typing import NamedTuple

import numpy as np
import pytest


class Scene(NamedTuple):
    """One layer: keys (G, S, D), queries of the prefill (H, T, D), later queries (H, N, D); float32."""

    keys: np.ndarray
    queries: np.ndarray
    later: np.ndarray


def rotate(x, positions, base=500_000.0):
    """Rotary position embedding, halves paired."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention_like(n_heads=4, n_kv=2, n_keys=4096, n_queries=256, n_later=32, dim=64, seed=0):
    """A document of Zipf words under drifting topics, seen by heads that each look for something else."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape, dtype=np.float32))

    rank = max(dim // 4, 4)
    n_all = n_keys + n_later
    n_words = 1500
    words = rng.choice(n_words, n_all, p=1 / np.arange(1, n_words + 1) / np.sum(1 / np.arange(1, n_words + 1)))
    topics = normal(n_all // 200 + 2, rank)[np.cumsum(rng.random(n_all) < 1 / 200)[:, None] % (n_all // 200 + 2)][:, 0]
    latent = normal(n_words, rank)[words] + 0.7 * topics + 0.4 * normal(n_all, rank)
    # What a head looks for sits in the slowly turning directions; the fast ones tell near from far.
    slow = np.tile(np.where(np.arange(dim // 2) < 0.4 * dim / 2, 0.3, 1.0), 2).astype(np.float32)
    spectrum = (1 / np.sqrt(1 + np.arange(rank))).astype(np.float32)
    positions = np.arange(n_all, dtype=np.float64)
    keys = np.empty((n_kv, n_keys, dim), np.float32)
    asked = np.linspace(n_keys // 8, n_keys - 1, n_queries).astype(int)
    queries = np.empty((n_heads, n_queries, dim), np.float32)
    later = np.empty((n_heads, n_later, dim), np.float32)
    for g in range(n_kv):
        mix = normal(rank, dim) * spectrum[:, None] * slow
        mean = 2.0 * normal(dim) * slow
        raw = mean + latent @ mix + 0.2 * normal(n_all, dim)
        hitters = rng.choice(n_keys, min(max(n_keys // 1000, 2), n_keys), replace=False)
        group = range(g * n_heads // n_kv, (g + 1) * n_heads // n_kv)
        common = 2.0 * normal(dim) * slow
        raw[hitters] += 1.0 * common
        keys[g] = rotate(raw[:n_keys], positions[:n_keys])
        for h in group:
            look = np.linalg.qr(normal(rank, rank))[0]
            wanted = (latent + 0.5 * normal(n_all, rank)) @ (0.5 * look + 0.5 * np.eye(rank, dtype=np.float32))
            asks = rotate(common + 0.7 * normal(dim) * slow + 1.0 * wanted @ mix + 0.5 * normal(n_all, dim), positions)
            queries[h], later[h] = asks[asked], asks[n_keys:]
    return Scene(keys, queries, later)


def as_bfloat16(x):
    """float32 rounded to bfloat16, as uint16 bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


# How tests make keys of a stored dtype out of float32.
STORED = {"float32": lambda x: x, "float16": lambda x: x.astype(np.float16), "bfloat16": as_bfloat16}

# Every dtype is compiled for anew, which costs more than its tests, and float16 differs from bfloat16 in one function.
every_stored = pytest.mark.parametrize(
    "dtype", [pytest.param(name, marks=pytest.mark.long) if name == "float16" else name for name in STORED]
)


def recall(found, truth):
    """The share of true ids that were found; both (..., k)."""
    pairs = zip(found.reshape(-1, found.shape[-1]), truth.reshape(-1, truth.shape[-1]), strict=True)
    return float(np.mean([np.isin(t, f).mean() for f, t in pairs]))
