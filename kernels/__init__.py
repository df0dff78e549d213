"""Attention over given keys: exact, partial, and in a form that merges.

`reference` defines every operation in plain float32; the files beside it are the same operations, fast.
"""

from .far import attend_far
from .knn import NearestKeys, nearest_keys
from .merge import AttentionState, merge
from .near import attend_near
from .patterns import HeadPattern
from .prefill import attend_dense
from .sparse import SparseIndex, attend_sparse
from .sparse_prefill import attend_adaptive, attend_patterns
from .tail import TailSummary

__all__ = [
    "AttentionState", "HeadPattern", "NearestKeys", "SparseIndex", "TailSummary", "attend_adaptive", "attend_dense",
    "attend_far", "attend_near", "attend_patterns", "attend_sparse", "merge", "nearest_keys",
]  # fmt: skip
