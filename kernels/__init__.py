"""Attention over given keys: exact, partial, and in a form that merges.

`reference` defines every operation in plain float32; the files beside it are the same operations, fast.
"""

from .far import attend_far
from .merge import AttentionState, merge
from .near import attend_near
from .prefill import attend_dense
from .tail import TailSummary

__all__ = ["AttentionState", "TailSummary", "attend_dense", "attend_far", "attend_near", "merge"]
