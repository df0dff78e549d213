"""How CPU code sees tensors: zero-copy arrays, bfloat16 read in place.

It never imports torch: a tensor is recognised by what it offers, so NumPy users need no torch.
"""

import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# NumPy has no bfloat16: such arrays travel as uint16 bits, and only bfloat16 ever travels as uint16.
BFLOAT16 = np.dtype(np.uint16)


def as_array(x: Any, name: str = "array") -> Array:
    """A NumPy view of `x` without a copy; bfloat16 tensors come back as their uint16 bits.

    x: NumPy array or CPU torch tensor; float32, float16, bfloat16 or int8 (other integers pass through, too).
    Raises TypeError for other types, ValueError for a tensor that is not in CPU memory.
    """
    if isinstance(x, np.ndarray):
        return x
    if not hasattr(x, "detach"):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be in CPU memory, got a tensor on {x.device}; move it with .cpu()")
    x = x.detach()
    if str(x.dtype) == "torch.bfloat16":
        return x.view(sys.modules["torch"].uint16).numpy()
    return x.numpy()


def as_float32(x: Array) -> Array:
    """`x` in float32; uint16 is read as bfloat16 bits. A copy unless `x` is float32 already."""
    if x.dtype == BFLOAT16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def as_stored(x: Array) -> Array:
    """`x` in the form compiled code reads with `as_float`: float16 as int16 bits (numba has no float16 on CPUs)."""
    return x.view(np.int16) if x.dtype == np.float16 else x
