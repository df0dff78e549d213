"""Causal attention over listed keys.

On a CPU the listed keys of a run are gathered and given to PyTorch's fused kernel; on a GPU a Triton kernel reads them
in place.
"""

from torch import Tensor

from retrieval_attn.kernels.merge import AttentionState
from retrieval_attn.kernels.sparse.lists import SparseIndex, check_sparse, why_not_sparse


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
        from retrieval_attn.kernels.sparse.on_gpu import attend_sparse as launch

        return launch(query, keys, values, scale, index)
    from retrieval_attn.kernels.sparse.on_cpu import attend_sparse as gather

    return gather(query, keys, values, scale, index)
