"""How CPU code is compiled: one `jit`, stored numbers read in place, and word when it takes a while.

The two leaves `index/` and `kernels/` stand on this file, on arrays.py and on threads/pool.py, and on nothing else of
the package.
"""

import logging
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

log = logging.getLogger("retrieval_attn")

# No "nnan"/"ninf": NaN and infinity keep their meaning; sums may be reordered, so that loops vectorise.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


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


def as_float(x: Any) -> float:
    """One stored element as float32, inside compiled code: uint16 is bfloat16 bits, int16 float16 bits, int8 itself."""
    raise TypeError("as_float() exists only inside compiled code")


# Without annotations: numba compares the two signatures to the letter.
@overload(as_float, inline="always")
def _as_float(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: _bfloat16_to_float32(x)  # type: ignore[call-arg]
    if x == types.int16:
        return lambda x: _float16_to_float32(x)  # type: ignore[call-arg]
    return lambda x: np.float32(x)


def jit(parallel: bool = False, **options: Any) -> Any:
    """`numba.njit` as this project uses it: cached on disk, without the GIL, reductions free to vectorise."""
    return numba.njit(parallel=parallel, cache=True, nogil=True, fastmath=FASTMATH, error_model="numpy", **options)


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
