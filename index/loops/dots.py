"""Inner products with stored keys, inside compiled code.

Stored keys arrive as one flat array (see `keys.py`): the row of key s of head g starts at g * stride_g + s * stride_s.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import as_float, intrinsic, jit


@jit()
def dot(flat: Array, row: int, query: Array) -> np.float32:
    """<key at `row`, query>, summed in float32."""
    key = flat[row : row + len(query)]
    # From zero, not from element 0: a loop over a round number of elements leaves no remainder to do one by one.
    total = np.float32(0)
    for d in range(len(query)):
        total += as_float(key[d]) * query[d]
    return total


@jit()
def squared_distance(flat: Array, row: int, point: Array) -> np.float32:
    """|key at `row` - point|^2, summed in float32."""
    key = flat[row : row + len(point)]
    total = np.float32(0)
    for d in range(len(point)):
        diff = as_float(key[d]) - point[d]
        total += diff * diff
    return total


@jit()
def read_key(flat: Array, row: int, out: Array) -> None:
    """out = key at `row`."""
    key = flat[row : row + len(out)]
    for d in range(len(out)):
        out[d] = as_float(key[d])


@jit()
def add_run(out: Array, values: Array, first: int) -> None:
    """out += values[first : first + len(out)], as a loop: numba takes seconds to compile what it may broadcast."""
    for j in range(len(out)):
        out[j] += values[first + j]


@jit()
def dots_4x1(flat: Array, row: int, stride: int, query: Array, out: Array) -> None:
    """out[j] = <key at row + j * stride, query> for j < 4."""
    dim = len(query)
    k0 = flat[row : row + dim]
    k1 = flat[row + stride : row + stride + dim]
    k2 = flat[row + 2 * stride : row + 2 * stride + dim]
    k3 = flat[row + 3 * stride : row + 3 * stride + dim]
    zero = query[0] - query[0]
    a0, a1, a2, a3 = zero, zero, zero, zero
    for d in range(dim):
        x = query[d]
        a0 += as_float(k0[d]) * x
        a1 += as_float(k1[d]) * x
        a2 += as_float(k2[d]) * x
        a3 += as_float(k3[d]) * x
    out[0], out[1], out[2], out[3] = a0, a1, a2, a3


@jit()
def dots_4x4(flat: Array, row: int, stride: int, queries: Array, first: int, out: Array, at: int) -> None:
    """out[i, at + j] = <key at row + j * stride, queries[first + i]> for i, j < 4.

    Each key element is loaded once for four queries, and the sixteen sums stay in registers.
    """
    dim = queries.shape[1]
    k0 = flat[row : row + dim]
    k1 = flat[row + stride : row + stride + dim]
    k2 = flat[row + 2 * stride : row + 2 * stride + dim]
    k3 = flat[row + 3 * stride : row + 3 * stride + dim]
    q0, q1, q2, q3 = queries[first], queries[first + 1], queries[first + 2], queries[first + 3]
    zero = q0[0] - q0[0]
    a00, a01, a02, a03 = zero, zero, zero, zero
    a10, a11, a12, a13 = zero, zero, zero, zero
    a20, a21, a22, a23 = zero, zero, zero, zero
    a30, a31, a32, a33 = zero, zero, zero, zero
    for d in range(dim):
        x0, x1, x2, x3 = q0[d], q1[d], q2[d], q3[d]
        y0, y1, y2, y3 = as_float(k0[d]), as_float(k1[d]), as_float(k2[d]), as_float(k3[d])
        a00 += x0 * y0
        a01 += x0 * y1
        a02 += x0 * y2
        a03 += x0 * y3
        a10 += x1 * y0
        a11 += x1 * y1
        a12 += x1 * y2
        a13 += x1 * y3
        a20 += x2 * y0
        a21 += x2 * y1
        a22 += x2 * y2
        a23 += x2 * y3
        a30 += x3 * y0
        a31 += x3 * y1
        a32 += x3 * y2
        a33 += x3 * y3
    out[0, at], out[0, at + 1], out[0, at + 2], out[0, at + 3] = a00, a01, a02, a03
    out[1, at], out[1, at + 1], out[1, at + 2], out[1, at + 3] = a10, a11, a12, a13
    out[2, at], out[2, at + 1], out[2, at + 2], out[2, at + 3] = a20, a21, a22, a23
    out[3, at], out[3, at + 1], out[3, at + 2], out[3, at + 3] = a30, a31, a32, a33


@intrinsic
def shift_right(typingctx: Any, array: Any, first: Any, n: Any) -> Any:
    """array[first + 1 : first + 1 + n] = array[first : first + n], for a one-dimensional C-contiguous array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        source = builder.gep(view.data, [args[1]])
        target = builder.gep(source, [ir.Constant(ir.IntType(64), 1)])
        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        cgutils.raw_memmove(builder, target, source, args[2], size)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen
