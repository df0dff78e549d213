"""How CPU code is compiled: one `jit`, stored numbers read in place, and word when it takes a while.

The two leaves `index/` and `kernels/` stand on this file, on arrays.py, atomic_file.py and threads/pool.py, and on
nothing else of the package. Where compiled code is kept, code_cache.py says.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import event
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import overload

from retrieval_attn.arrays import Array
from retrieval_attn.code_cache import CodeCache, place

log = logging.getLogger("retrieval_attn")

# Bytes that one request to memory brings.
CACHE_LINE = 64

# No "nnan"/"ninf": NaN and infinity keep their meaning; sums may be reordered, so that loops vectorise.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def intrinsic(define: Callable[..., Any]) -> Any:
    """`numba.extending.intrinsic`: instructions of our own, called without the context that `define` is given first."""
    return numba_intrinsic(define)


@intrinsic
def _bfloat16_to_float32(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _float16_to_float32(typingctx: Any, bits: Any) -> Any:
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
        return lambda x: _bfloat16_to_float32(x)
    if x == types.int16:
        return lambda x: _float16_to_float32(x)
    return lambda x: np.float32(x)


def jit(parallel: bool = False, **options: Any) -> Any:
    """`numba.njit` as this project uses it: kept on disk, without the GIL, reductions free to vectorise."""
    compiled = numba.njit(parallel=parallel, nogil=True, fastmath=FASTMATH, error_model="numpy", **options)

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = compiled(function)
        # With NUMBA_DISABLE_JIT the function stays as it is.
        if dispatcher is not function:
            dispatcher._cache = CodeCache(function)
        return dispatcher

    return decorate


@intrinsic
def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index] of a one-dimensional C-contiguous array; the index is not checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        read, keep_in_all_levels, is_data = number(0), number(3), number(1)
        ask = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(ask, [address, read, keep_in_all_levels, is_data])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def _per_line(typingctx: Any, array: Any) -> Any:
    """Elements that one request brings: a constant of the type, where `itemsize` would be read and divided by."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        return ir.Constant(ir.IntType(64), CACHE_LINE // size)

    return types.intp(array), codegen


@jit()
def prefetch(flat: Array, first: int, n: int = 1) -> None:
    """Ask memory for what is read soon: flat[first : first + n], which may lie outside of the array. C-contiguous."""
    for i in range(0, n, _per_line(flat)):
        _prefetch(flat, first + i)


class CompilationNotice(event.Listener):
    """Says once that kernels are being compiled, when that has taken `patience` seconds in all.

    Numba compiles in one thread at a time, and what a function calls within the compilation of the function.
    timer: as `threading.Timer`.
    """

    def __init__(self, patience: float = 1.0, timer: Callable[..., Any] = threading.Timer) -> None:
        self._left = patience
        self._new_timer = timer
        self._timer: Any = None
        self._since = 0.0
        self._depth = 0
        self._said = False

    def on_start(self, event: Any) -> None:
        if not _is_ours(event):
            return
        if self._depth == 0 and not self._said:
            self._since = time.monotonic()
            self._start_timer()
        self._depth += 1

    def on_end(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self._depth -= 1
        if self._depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left -= time.monotonic() - self._since

    def _start_timer(self) -> None:
        self._timer = self._new_timer(max(0.0, self._left), self._say)
        self._timer.daemon = True
        # At the end of the process, or of its memory, no thread starts. Then nothing is said.
        with suppress(RuntimeError):
            self._timer.start()

    def _say(self) -> None:
        self._said = True
        where = place()
        log.warning("compiling CPU kernels (%s) ...", f"once; kept in {where.base}" if where else "in every process")


def _is_ours(event: Any) -> bool:
    return isinstance(getattr(event.data["dispatcher"], "_cache", None), CodeCache)


NOTICE = CompilationNotice()
event.register("numba:compile", NOTICE)
