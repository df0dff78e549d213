"""Sparse prefill on a CPU: gather the listed keys of a run of queries, then one call of PyTorch's fused kernel.

A run of 64 queries over 4,096 keys of 128 costs 6.7e7 multiply-adds, 0.8 ms on the two cores it was measured on, and
4 MB of gathered rows, 0.14 ms; the products run nearly as fast as in dense attention. No compiler is needed then.
"""

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.kernels.merge import AttentionState, attend
from retrieval_attn.kernels.sparse.lists import SparseIndex


def attend_sparse(query: Tensor, keys: Tensor, values: Tensor, scale: float, index: SparseIndex) -> AttentionState:
    """Causal attention over listed keys, of CPU tensors; contract and checks: attend.py."""
    B, H, T, _ = query.shape
    # CPUs convert float16 faster than they compute with it.
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    out, lse = query.new_empty(query.shape), query.new_empty((B, H, T), dtype=torch.float32)
    R = H // keys.shape[1]
    listed = _Listed(index, keys.shape[2] - T, keys.shape[2])
    runs = _Runs(index, keys.shape[2], dtype)
    for b in range(B):
        for h in range(H):
            head = keys[b, h // R], values[b, h // R]
            for n, start in enumerate(range(0, T, index.rows)):
                here = slice(start, min(T, start + index.rows))
                # The fused kernel takes a row's elements for neighbours, without looking.
                asked = query[b, h, here].to(dtype).contiguous()
                out[b, h, here], lse[b, h, here] = runs.attend(asked, *head, scale, *listed.of(b, h, n))
    return AttentionState(out, lse)


class _Listed:
    """The keys that an index lists, run by run: those after the run's first query first."""

    def __init__(self, index: SparseIndex, past: int, n_keys: int) -> None:
        self._arrays = tuple(x.numpy() for x in index[:4])
        self._past, self._rows, self._width, self._n_keys = past, index.rows, index.width, n_keys
        most = 0
        lists = [
            ("n_blocks", index.n_blocks, index.blocks, index.width),
            ("n_columns", index.n_columns, index.columns, 1),
        ]
        for name, counts, x, size in lists:
            low, high = (int(n) for n in torch.aminmax(counts))
            if low < 0 or high > x.shape[3]:
                raise ValueError(f"index.{name} must be between 0 and {x.shape[3]}, got {low} to {high}")
            most += size * high
        self._ids = np.empty(most, np.int64)

    def of(self, b: int, h: int, n: int) -> tuple[Tensor, Tensor]:
        """Ids of the keys of a run, those first that its first query does not see; and how far these are behind it."""
        first = self._past + n * self._rows
        blocks, n_blocks, columns, n_columns = (x[b, h, n] for x in self._arrays)
        lists = blocks[:n_blocks], columns[:n_columns], self._width
        n_late = _list_keys(*lists, first + 1, min(first + self._rows, self._n_keys), self._ids, 0)
        n_all = _list_keys(*lists, 0, first + 1, self._ids, n_late)
        if n_late >= self._rows or n_all > self._n_keys:
            raise ValueError(f"index must list no key twice in a run, got {n_all} keys of {self._n_keys} in run {n}")
        ids = torch.from_numpy(self._ids[:n_all])
        return ids, ids[:n_late] - first


@jit()
def _list_keys(blocks: Array, columns: Array, width: int, low: int, high: int, ids: Array, n: int) -> int:
    """Write the listed keys in [low, high) behind the first n ids; returns how many ids there are then."""
    for start in blocks:
        for key in range(max(low, start), min(high, start + width)):
            ids[n] = key
            n += 1
    for key in columns:
        if low <= key < high:
            ids[n] = key
            n += 1
    return n


class _Runs:
    """Attends one run of queries at a time; holds the memory that runs use again and again."""

    def __init__(self, index: SparseIndex, n_keys: int, dtype: torch.dtype) -> None:
        self._rows, self._dtype = index.rows, dtype
        # All keys but a run's own are seen by all its queries: only the columns left of `rows - 1` are ever not zero.
        self._mask = torch.zeros((index.rows, index.rows - 1 + n_keys), dtype=dtype)
        self._lower = torch.arange(index.rows)[:, None]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, ids: Tensor, late: Tensor
    ) -> tuple[Tensor, Tensor]:
        """out (n, D) and lse (n,) of queries for the keys (S, D) named by `ids`.

        late: of the first ids, which do not include what the first query sees, how far behind that query they are.
        """
        chosen = (x.index_select(0, ids).to(self._dtype) for x in (keys, values))
        mask = self._masked(late, len(query), len(ids))
        if len(late) == len(ids):
            # Some queries may see no key at all, of which the fused kernel would make NaN.
            k, v = chosen
            state = attend(query.float() @ k.float().T * scale + mask.float(), v.float())
            return state.out, state.lse
        k, v = chosen
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(
            query[None, None], k[None, None], v[None, None], 0.0, False, attn_mask=mask[None, None], scale=scale
        )
        return out[0, 0], lse[0, 0]

    def _masked(self, late: Tensor, n_rows: int, n_ids: int) -> Tensor:
        start = self._rows - 1 - len(late)
        self._mask[:, start : self._rows - 1] = torch.where(late > self._lower, -torch.inf, 0.0)
        return self._mask[:n_rows, start : start + n_ids]
