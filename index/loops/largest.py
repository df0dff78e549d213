"""The n largest entries of an array, inside compiled code, when their order does not matter.

Floats are compared as integers of the same order; the n-th largest is then found by halving an interval and counting.
A count is a vectorised sweep, so this costs a few sweeps whatever n is, where a heap pays for every entry it takes in.
"""

import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit

_LEAST, _MAGNITUDE = np.int32(-(2**31)), np.int32(2**31 - 1)


@jit()
def choose(values: Array, out: Array) -> None:
    """out = positions of the largest `values`, in rising order; of equal ones, the first.

    values: float32, at least as many as `out` has places. An entry that is no number may rank anywhere.
    """
    ranks = np.empty(len(values), np.int32)
    write_ranks(values.view(np.int32), ranks)
    least = nth_largest(ranks, len(out))
    n_equal = len(out) - count_above(ranks, least)
    n = 0
    for i in range(len(ranks)):
        if ranks[i] < least:
            continue
        if ranks[i] == least:
            if n_equal == 0:
                continue
            n_equal -= 1
        out[n] = i
        n += 1


@jit()
def write_ranks(bits: Array, out: Array) -> None:
    """out = integers in the order of the floats that have these bits. Both zeros are equal."""
    for i in range(len(bits)):
        x = bits[i] if bits[i] != _LEAST else np.int32(0)
        # Negative floats grow as their bits without the sign fall.
        out[i] = x ^ ((x >> np.int32(31)) & _MAGNITUDE)


@jit()
def nth_largest(ranks: Array, n: int) -> np.int32:
    """The n-th largest rank; or, found sooner, a lower bound that exactly n ranks reach."""
    low, high = np.int64(ranks.min()), np.int64(ranks.max())
    while low < high:
        middle = (low + high + 1) >> 1
        n_reaching = count_above(ranks, np.int32(middle - 1))
        if n_reaching == n:
            return np.int32(middle)
        if n_reaching > n:
            low = middle
        else:
            high = middle - 1
    return np.int32(low)


@jit()
def count_above(ranks: Array, bound: np.int32) -> np.int32:
    n = np.int32(0)
    for i in range(len(ranks)):
        n += np.int32(ranks[i] > bound)
    return n
