"""Which keys each run of queries attends to: blocks of consecutive keys and single keys.

One format serves every sparse pattern of prefill; the patterns differ in who writes the list.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.dense import check_attention
from retrieval_attn.kernels.merge import has_triton

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
