"""How CPU code sees tensors: zero-copy arrays, bfloat16 read in place, one way to compile, one way to use the cores.

The two leaves `index/` and `kernels/` both stand on this file and on nothing else of the package.
It never imports torch: a tensor is recognised by what it offers, so NumPy users need no torch.
"""

import logging
import sys
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

log = logging.getLogger("retrieval_attn")

Array = np.ndarray[Any, Any]

# NumPy has no bfloat16: such arrays travel as uint16 bits, and only bfloat16 ever travels as uint16.
BFLOAT16 = np.dtype(np.uint16)

# No "nnan"/"ninf": NaN and infinity keep their meaning; sums may be reordered, so that loops vectorise.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


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
    """`x` in the form compiled code reads with `load`: float16 as int16 bits (numba has no float16 on CPUs)."""
    return x.view(np.int16) if x.dtype == np.float16 else x


@intrinsic
def _bfloat16_to_float32(typingctx, bits):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _float16_to_float32(typingctx, bits):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


def load(x: Any) -> float:
    """One stored element as float32, inside compiled code: uint16 is bfloat16 bits, int16 float16 bits, int8 itself."""
    raise TypeError("load() exists only inside compiled code")


# Without annotations: numba compares the two signatures to the letter.
@overload(load, inline="always")
def _load(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: _bfloat16_to_float32(x)  # type: ignore[call-arg]
    if x == types.int16:
        return lambda x: _float16_to_float32(x)  # type: ignore[call-arg]
    return lambda x: np.float32(x)


def jit(parallel: bool = False, **options: Any) -> Any:
    """`numba.njit` as this project uses it: cached on disk, without the GIL, reductions free to vectorise."""
    return numba.njit(parallel=parallel, cache=True, nogil=True, fastmath=FASTMATH, error_model="numpy", **options)


@numba.njit(parallel=True, cache=True)
def _touch_pool(n: int) -> int:
    total = 0
    for i in numba.prange(n):
        total += i
    return total


_pool_checked = False


def require_safe_threads() -> None:
    """Start numba's thread pool and refuse the one layer that cannot be shared between Python threads.

    The builder and the decoder enter parallel loops from two threads at once; numba's `workqueue` layer aborts the
    whole process then. Raises RuntimeError with the way out. Cheap after the first call.
    """
    global _pool_checked
    if _pool_checked:
        return
    _touch_pool(numba.get_num_threads())
    layer = numba.threading_layer()  # type: ignore[attr-defined]
    if layer == "workqueue":
        raise RuntimeError(
            "numba's threading layer must be 'omp' or 'tbb', got 'workqueue', which aborts when two threads use it; "
            "install OpenMP (Debian: apt-get install libgomp1) or `pip install tbb`"
        )
    _pool_checked = True


def set_threads(n: int) -> None:
    """Let numba's parallel loops, called from this thread, use at most `n` cores (and at least one)."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(n, most)))


class announce_compilation:
    """Context manager that says once, after a second of waiting, that kernels are being compiled.

    Compiled kernels are cached on disk, so on a second run the body returns at once and nothing is said.
    """

    _said = False

    def __init__(self, say: Any = None) -> None:
        self._say = say or log.warning

    def _announce(self) -> None:
        if not announce_compilation._said:
            announce_compilation._said = True
            self._say("compiling CPU kernels (once per machine) ...")

    def __enter__(self) -> None:
        self._timer = threading.Timer(1.0, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
