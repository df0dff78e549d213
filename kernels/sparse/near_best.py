"""Keys chosen anew for every run of queries: all whose score comes near the best of some query of the run.

Columns and diagonals serve heads that look at the same places all the time. Heads that retrieve look at a place of
their own with every query, and no sample of the queries knows where. On a CPU with bfloat16 products, all scores of a
run cost a fifth to a third of its dense attention; they are rounded, so they only choose what is then read exactly. The
threshold is relative to each query's best, as FlashPrefill's (arXiv 2603.06199) is for blocks.
"""

import functools
import os
from collections.abc import Iterable, Sequence

import llvmlite.binding
import numba
import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.kernels.sparse.coverage import NOWHERE, Layout
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.probes import N_FIRST, N_NEAR

# Keys that a task of the comparison looks at: two bytes each, they stay in a core's first cache.
PART = 4096

# Of two scores in bfloat16, one may be rounded up and one down.
ROUNDING = 2.0**-7

# How far below its best a query's keys are read at, in natural logarithms of weight; the least that suffices is taken.
DELTAS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)

# Instructions for products of bfloat16, as LLVM names them: AVX-512 and AMX on x86, FEAT_BF16 on ARM. Without them such
# a product is made of products of float32, and takes longer.
PRODUCTS = {"avx512bf16", "amx-bf16", "bf16"}

# What oneDNN, which multiplies for PyTorch, may be limited to, of all that does not have them.
WITHOUT_PRODUCTS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}

# What choosing costs, as a share of the keys that a query sees, in units of keys read sparsely.
CHOOSING = 0.1


@functools.cache
def is_quick() -> bool:
    """Whether PyTorch multiplies bfloat16 much faster than float32 on this CPU.

    The processor's instructions say so, not a clock: what is read must not depend on what else the machine is doing.
    """
    features = llvmlite.binding.get_host_cpu_features()
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.backends.mkldnn.is_available() and multiplies_bfloat16((f for f, on in features.items() if on), most)


def multiplies_bfloat16(features: Iterable[str], most: str = "") -> bool:
    """Whether a CPU of these features has products of bfloat16, and oneDNN, limited to `most`, may use them."""
    return not PRODUCTS.isdisjoint(features) and most.upper() not in WITHOUT_PRODUCTS


class Chooser:
    """Chooses among the keys of one KV head, for one run of queries at a time. Not for two threads at once."""

    def __init__(self, keys: Tensor, layout: Layout) -> None:
        """keys: (S, D)."""
        wide = keys.float()
        # What all keys have in common changes no softmax, but makes scores large and their rounding coarse.
        self._keys = (wide - wide.mean(0)).bfloat16().T  # [D, S]
        self._layout = layout
        self._scores = torch.empty(layout.rows * layout.S, dtype=torch.bfloat16)
        self._kept = np.empty(layout.S, np.int16)
        self._columns = torch.arange(layout.rows)

    def choose(self, query: Tensor, n: int, delta: float) -> Array:
        """Positions of keys for run n, whose queries (T, D) are scaled; those always read as blocks are not named."""
        layout, n_rows = self._layout, len(query)
        start = layout.past + n * layout.rows
        near = max(0, start - N_NEAR * layout.width)
        stop = start + n_rows
        scores = self._scores[: n_rows * stop].view(n_rows, stop)
        torch.mm(query.bfloat16(), self._keys[:, :stop], out=scores)
        future = self._columns[:n_rows] > self._columns[:n_rows, None]
        scores[:, start:].masked_fill_(future, -torch.inf)
        bits = scores.view(torch.int16).numpy()
        best = _unordered(_best(bits))
        _mark_above(bits, near, _order(best - delta - ROUNDING * best.abs()), self._kept)
        self._kept[: min(N_FIRST, near)] = 1
        return np.flatnonzero(self._kept[:near])


def list_near_best(
    query: Tensor, choosers: Sequence[Chooser], scale: float, deltas: list[float], layout: Layout
) -> SparseIndex:
    """The index of heads (h, T, D), each with its own `delta`. choosers: one for each of the g KV heads, in order."""
    columns, counts = [], torch.zeros((1, len(query), layout.n_runs), dtype=torch.int32)
    for h, queries in enumerate(query):
        chooser = choosers[h * len(choosers) // len(query)]
        for n, rows in enumerate(queries.float().mul(scale).split(layout.rows)):
            columns.append(torch.from_numpy(chooser.choose(rows, n, deltas[h])).int())
            counts[0, h, n] = len(columns[-1])
    listed = torch.full((1, len(query), layout.n_runs, int(counts.max())), NOWHERE, dtype=torch.int32)
    for row, found in zip(listed.view(len(columns), -1), columns, strict=True):
        row[: len(found)] = found
    behind = layout.width * torch.arange(-N_NEAR, layout.rows // layout.width)
    blocks = (layout.run_starts()[:, None] + behind).int().expand(1, len(query), -1, -1).contiguous()
    n_blocks = torch.full_like(counts, blocks.shape[3])
    return SparseIndex(blocks, n_blocks, listed, counts, layout.rows, layout.width)


def count_near_best(
    query: Tensor, choosers: Sequence[Chooser], scale: float, deltas: list[float], layout: Layout
) -> Tensor:
    """(h,) keys chosen for a run in the middle, as a sample of what `list_near_best` would list."""
    n = layout.n_runs // 2
    counts = torch.zeros(len(query))
    for h, queries in enumerate(query):
        rows = queries[n * layout.rows : (n + 1) * layout.rows].float() * scale
        counts[h] = len(choosers[h * len(choosers) // len(query)].choose(rows, n, deltas[h]))
    return counts


def _order(x: Tensor) -> Array:
    """Numbers as bfloat16, as integers that compare like them."""
    bits = x.bfloat16().view(torch.int16).numpy()
    return (bits ^ ((bits >> 15) & 0x7FFF)).astype(np.int16)


def _unordered(x: Array) -> Tensor:
    """The numbers, in float32, that `_order` made integers of."""
    return torch.from_numpy((x ^ ((x >> 15) & 0x7FFF)).astype(np.int16)).view(torch.bfloat16).float()


@jit(inline="always")
def _ordered(bits: np.int16) -> np.int16:
    return np.int16(bits ^ np.int16((bits >> np.int16(15)) & np.int16(0x7FFF)))


@jit(parallel=True)
def _best(bits: Array) -> Array:
    """The largest of each row of bfloat16 bits, as an ordered integer."""
    n_rows, n_keys = bits.shape
    best = np.empty(n_rows, np.int16)
    for i in numba.prange(n_rows):
        row, top = bits[i], np.int16(-32768)
        for j in range(n_keys):
            top = max(top, _ordered(row[j]))
        best[i] = top
    return best


@jit(parallel=True)
def _mark_above(bits: Array, n_keys: int, limits: Array, kept: Array) -> None:
    """1 for each of the first columns in which some row is above its limit, else 0."""
    n_rows = len(bits)
    for part in numba.prange((n_keys + PART - 1) // PART):
        start, stop = part * PART, min(n_keys, (part + 1) * PART)
        marks = kept[start:stop]
        marks[:] = 0
        for i in range(n_rows):
            row, limit = bits[i, start:stop], limits[i]
            for j in range(stop - start):
                marks[j] = np.int16(marks[j] | np.int16(_ordered(row[j]) > limit))
