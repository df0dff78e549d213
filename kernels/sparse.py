"""Causal attention over listed keys: per run of queries, blocks of consecutive keys and single keys.

One format serves every sparse pattern of prefill; the patterns differ in who writes the list. On a CPU the
listed keys of a run are gathered and given to PyTorch's fused kernel; on a GPU a Triton kernel reads them in place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .merge import AttentionState, has_triton
from .prefill import check_attention

HEAD_DIMS = (64, 96, 128, 256)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class SparseIndex(NamedTuple):
    """Which keys each run of `rows` consecutive queries attends to.

    The queries are the last T of S positions, in N = ceil(T / rows) runs. Positions are those of keys, 0 to S - 1; what
    is listed after a query, below 0 or past S - 1 is left out. A position listed twice in a run would count twice.

    blocks: (B, H, N, A) int32, first position of each block of `width` consecutive keys.
    n_blocks: (B, H, N) int32, how many blocks the run has; the rest of its row means nothing.
    columns: (B, H, N, C) int32, positions of single keys.
    n_columns: (B, H, N) int32, how many.
    """

    blocks: Tensor
    n_blocks: Tensor
    columns: Tensor
    n_columns: Tensor
    rows: int = 64
    width: int = 64


def attend_sparse(query: Tensor, keys: Tensor, values: Tensor, scale: float, index: SparseIndex) -> AttentionState:
    """Causal attention of every query to the keys that `index` lists for its run.

    query: (B, H, T, D), the last T of S positions; keys, values: (B, G, S, D), on one device, of one dtype
    (float16, bfloat16, float32); KV head of query head h is h // R. D is 64, 96, 128 or 256 on a GPU, any on a CPU.
    Accumulates in float32; returns `out` in the query's dtype, and lse. A query that attends to nothing is empty.
    Raises ValueError for shapes, dtypes and devices that do not fit, S < T, and an index of another shape.
    Leaves its arguments unchanged; safe from many threads.
    """
    check_sparse(query, keys, values, index)
    if query.shape[2] == 0:
        return AttentionState.empty((*query.shape[:3], values.shape[3]), query.dtype, query.device)
    if query.device.type != "cpu":
        if reason := why_not_sparse((query.dtype,), keys.shape[3], values.shape[3], query.device):
            raise ValueError(f"sparse attention cannot run: {reason}")
        from .triton_sparse import attend_sparse as launch

        return launch(query, keys, values, scale, index)
    from .sparse_cpu import attend_sparse as gather

    return gather(query, keys, values, scale, index)


def why_not_sparse(dtypes: Sequence[torch.dtype], key_dim: int, value_dim: int, device: torch.device) -> str:
    """Why sparse attention cannot take such heads on this device; empty if it can. dtypes: of queries, keys, values."""
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        found = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it wants queries, keys and values in float16, bfloat16 or float32, all in one, got {found}"
    if key_dim != value_dim:
        return f"it wants keys and values of one dimension, got {key_dim} and {value_dim}"
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"there is no kernel for devices of type {device.type!r}"
    if key_dim not in HEAD_DIMS:
        return f"it wants a head dimension of {', '.join(map(str, HEAD_DIMS))} on a GPU, got {key_dim}"
    return "" if has_triton(device) else "it wants Triton, which does not run here"


def check_sparse(query: Tensor, keys: Tensor, values: Tensor, index: SparseIndex) -> None:
    """Raises ValueError unless everything fits together."""
    check_causal(query, keys, values)
    B, H, T, _ = query.shape
    runs = (B, H, -(-T // index.rows))
    for name, x in zip(index._fields[:4], index[:4], strict=True):
        if x.shape[:3] != runs or x.ndim != (3 if name.startswith("n_") else 4) or x.dtype != torch.int32:
            raise ValueError(f"index.{name} must be int32 of shape {runs}, got {x.dtype} of {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"index and query must be on one device, got {x.device} and {query.device}")


def check_causal(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError for shapes, dtypes and devices that sparse causal attention cannot take."""
    check_attention(query, keys, values)
    if query.dtype not in DTYPES or not query.dtype == keys.dtype == values.dtype:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (query, keys, values))
        raise ValueError(f"query, keys and values must all be float16, bfloat16 or float32, got {found}")
    T, S = query.shape[2], keys.shape[2]
    if S < T:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {S} keys and {T} queries")
    if keys.shape[3] != values.shape[3]:
        raise ValueError(f"keys and values must be of one dimension, got {keys.shape[3]} and {values.shape[3]}")
