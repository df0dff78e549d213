"""Which index serves a context: what it takes in memory, and what `index="auto"` decides.

What is known comes from rows of bench/results/ made by `retrieval-attn bench recall` on two cores: at 128K keys a scan
takes a fifth of the graph's time, at 1M keys half of it.
"""

from typing import NamedTuple

import psutil

from retrieval_attn.config import RetrievalConfig

# Far keys from which a search by graph should take less time than a scan of codes: extrapolated. At 1M keys the scan
# still takes half the graph's time, having grown 3.3 times since 128K, the graph 1.9 times.
GRAPH_FROM = 1 << 22

# Decode steps on one document after which building its graph has paid, at that length, by the same guess.
GRAPH_AFTER_STEPS = 20_000

# Of the free memory, at most this share goes into indexes that nobody asked for by name.
MEMORY_SHARE = 0.5


class IndexChoice(NamedTuple):
    """A kind of index and, in a few words, why."""

    kind: str
    reason: str


def bytes_per_key(kind: str, dim: int) -> int:
    """Bytes that an index takes beside the key itself, per key and KV head, about; for "auto", at most."""
    sizes = {
        "exact": 0,
        # faiss keeps a float32 copy of the keys, and ids of 8 bytes.
        "ivf": 4 * dim + 8,
        # Links of 4 bytes, and the means of pairs of keys, one byte a number.
        "graph": 60 + dim // 2,
        "scan": dim // 2 + 8,
        "page": dim // 4,
    }
    return max(sizes["graph"], sizes["scan"]) if kind == "auto" else sizes[kind]


def choose_index(
    config: RetrievalConfig,
    n_far: int,
    n_layers: int = 1,
    kv_heads: int = 1,
    dim: int = 128,
    steps: int = 0,
    free: int | None = None,
) -> IndexChoice:
    """The kind of index for a far context of `n_far` keys per head.

    n_layers, kv_heads, dim: how many such contexts there are, to judge memory by. steps: decode steps so far on this
    document, which tell how much it is used. free: bytes of CPU memory; None: what is free on this machine.
    """
    if n_far < config.exact_below:
        return IndexChoice("exact", f"{n_far} far keys are fewer than exact_below={config.exact_below}")
    if config.index != "auto":
        return IndexChoice(config.index, "asked for")
    available = psutil.virtual_memory().available if free is None else free
    budget = MEMORY_SHARE * available
    rows = n_far * n_layers * kv_heads
    if n_far >= GRAPH_FROM and steps >= GRAPH_AFTER_STEPS and rows * bytes_per_key("graph", dim) <= budget:
        return IndexChoice("graph", f"{n_far} far keys and {steps} steps: its build has paid by now")
    if rows * bytes_per_key("scan", dim) <= budget:
        return IndexChoice("scan", f"fastest at {n_far} far keys, nothing to train, and memory for its codes")
    if rows * bytes_per_key("page", dim) <= budget:
        return IndexChoice("page", f"memory is short: {budget / 2**30:.1f} GiB for indexes of {n_far} far keys")
    return IndexChoice("exact", f"memory is short: {budget / 2**30:.1f} GiB for indexes of {n_far} far keys")
