"""Attention over given keys: exact, partial, and in a form that merges.

`reference` defines every operation in plain float32; the files beside it are the same operations, fast.
"""

from retrieval_attn.kernels.dense import attend_dense
from retrieval_attn.kernels.far import attend_far
from retrieval_attn.kernels.merge import AttentionState, merge
from retrieval_attn.kernels.near import attend_near, attend_window
from retrieval_attn.kernels.sparse.attend import attend_sparse
from retrieval_attn.kernels.sparse.by_head import attend_adaptive, attend_patterns
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.patterns import HeadPattern
from retrieval_attn.kernels.tail import TailSummary

__all__ = [
    "AttentionState",
    "HeadPattern",
    "SparseIndex",
    "TailSummary",
    "attend_adaptive",
    "attend_dense",
    "attend_far",
    "attend_near",
    "attend_patterns",
    "attend_sparse",
    "attend_window",
    "merge",
]
