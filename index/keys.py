"""The keys an index stands on: the caller's memory, seen as one flat array, or a growing copy of our own."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.arrays import BFLOAT16, Array, as_array, as_float32, as_stored
from retrieval_attn.compiled import jit
from retrieval_attn.index.lift import Lift

# int8 keys are plain numbers: whoever scaled them multiplies the queries instead.
INT8 = np.dtype(np.int8)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "int8": INT8}


class FlatKeys(NamedTuple):
    """Keys for compiled code: the row of key s of head g starts at values[g * stride_g + s * stride_s].

    values: one-dimensional, contiguous; float32, int8, uint16 (bfloat16 bits) or int16 (float16 bits). Strides in
    elements. bonus: (G, n) float32, n >= S, or (G, 0), as in `Keys`.
    """

    values: Array
    stride_g: int
    stride_s: int
    bonus: Array


class HeadKeys(NamedTuple):
    """The keys of one head for compiled code: the row of key s starts at values[start + s * stride].

    bonus: (n,) float32, what to add to the score of each key; empty for nothing.
    """

    values: Array
    start: int
    stride: int
    bonus: Array


@jit(inline="always")
def of_head(keys: FlatKeys, head: int) -> HeadKeys:
    """The keys of one head, inside compiled code."""
    return HeadKeys(keys.values, head * keys.stride_g, keys.stride_s, keys.bonus[head])


class Keys:
    """Keys (G, S, D), never changed; growing makes another object, so a search keeps the keys that it began with.

    array: the caller's array itself (or a part of our own buffer after `grown` without `keys`); bfloat16 as uint16.
    lift: None, or what adds a random bonus to every score (see lift.py).
    bonus: (G, n) float32, n >= S: what is added to the score of each key; (G, 0) without a lift.
    """

    def __init__(self, array: Array, buffer: Array | None = None, lift: Lift | None = None) -> None:
        self.array = array
        self.lift = lift
        self.bonus = lift.bonuses(array.shape[1]) if lift else np.empty((len(array), 0), np.float32)
        self.flat = _flatten(array, self.bonus)
        self._buffer = buffer

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.array.shape

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.array.dtype)

    def of_head(self, head: int) -> HeadKeys:
        """The keys of one head, for compiled code."""
        values, stride_g, stride_s, bonus = self.flat
        return HeadKeys(values, head * stride_g, stride_s, bonus[head])

    def float32(self, head: int) -> Array:
        """The keys of one head, (S, D) float32, C-contiguous."""
        return np.ascontiguousarray(as_float32(self.array[head]))

    def lifted(self, head: int) -> Array:
        """As `float32`, with the bonus as one more coordinate, (S, D + 1), if there is a lift."""
        if self.lift is None:
            return self.float32(head)
        return np.concatenate([self.float32(head), self.bonus[head, : self.shape[1], None]], axis=1)

    def grown(self, new: Any, keys: Any = None) -> "Keys":
        """These keys followed by `new` (G, n, D).

        keys: the caller's own (G, S + n, D) array with the same leading rows, used in place from then on.
        Without it, the keys move to a buffer of our own that doubles when it is full.
        """
        n_heads, n_old, dim = self.shape
        new = check_keys(new, "new_keys", dtype=self.array.dtype, n_heads=n_heads, dim=dim)
        if keys is None:
            return self._grown_copy(new)
        whole = as_layout(keys, "keys")
        expected = (n_heads, n_old + new.shape[1], dim)
        if whole.shape != expected or whole.dtype != self.array.dtype:
            raise ValueError(
                f"keys must be {expected} {self.dtype_name} (the indexed keys followed by new_keys), "
                f"got {whole.shape} {whole.dtype}"
            )
        self._check_rows(whole[:, :n_old])
        if not agree(whole[:, n_old:], new):
            raise ValueError(f"keys must end with the {new.shape[1]} rows of new_keys; sampled rows differ")
        return Keys(whole, lift=self.lift)

    def first(self, n_keys: int) -> "Keys":
        """The first n_keys of these. What grows from here leaves the rows that older objects read alone."""
        return Keys(self.array[:, :n_keys], lift=self.lift)

    def moved(self, keys: Any = None) -> "Keys":
        """The same keys, for an index that goes its own way; it never writes behind these.

        keys: the caller's own (G, n, D) array, n >= S, whose first S rows they are, used in place from then on.
        Without it, they stay where they are.
        """
        n_keys = self.shape[1]
        if keys is None:
            return self.first(n_keys)
        whole = as_layout(keys, "keys")
        array = whole[:, :n_keys]
        if array.shape != self.shape or array.dtype != self.array.dtype:
            raise ValueError(
                f"keys must be {self.shape} {self.dtype_name} (the indexed keys; more may follow them), "
                f"got {whole.shape} {whole.dtype}"
            )
        self._check_rows(array)
        return Keys(array, lift=self.lift)

    def _check_rows(self, array: Array) -> None:
        if not agree(array, self.array):
            raise ValueError(f"keys must begin with the {self.shape[1]} keys already indexed; sampled rows differ")

    def _grown_copy(self, new: Array) -> "Keys":
        n_heads, n_old, dim = self.shape
        n = n_old + new.shape[1]
        buffer = self._buffer
        if buffer is None or buffer.shape[1] < n:
            buffer = np.empty((n_heads, max(2 * n_old, n, 64), dim), self.array.dtype)
            buffer[:, :n_old] = self.array
        # Rows past n_old belong to no published view, so writing them disturbs no search.
        buffer[:, n_old:n] = new
        return Keys(buffer[:, :n], buffer, self.lift)


def check_keys(x: Any, name: str, *, dtype: Any = None, n_heads: int | None = None, dim: int | None = None) -> Array:
    """`x` as a finite (G, n, D) array whose rows are contiguous, without a copy, or ValueError."""
    array = as_layout(x, name)
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"{name} must have the dtype of the index, {dtype} (uint16 is bfloat16), got {array.dtype}")
    if n_heads is not None and (array.shape[0], array.shape[2]) != (n_heads, dim):
        raise ValueError(f"{name} must be ({n_heads}, n, {dim}) (KV heads, keys, head dimension), got {array.shape}")
    if array.dtype == INT8:
        return array
    flat = _flatten(array, np.empty((len(array), 0), np.float32))
    for head in range(array.shape[0]):
        row = _first_not_finite(array, flat, head)
        if row >= 0:
            raise ValueError(f"{name} must be finite, got NaN or infinity in head {head}, row {row}")
    return array


def as_layout(x: Any, name: str) -> Array:
    """`x` as (G, S, D) with contiguous rows, of one of DTYPES, without a copy."""
    array = as_array(x, name)
    if array.ndim != 3 or 0 in (array.shape[0], array.shape[2]):
        raise ValueError(f"{name} must be (G, S, D) (KV heads, keys, head dimension), got shape {array.shape}")
    if array.dtype not in DTYPES.values():
        raise ValueError(f"{name} must be {', '.join(DTYPES)} (bfloat16 as uint16 bits), got {array.dtype}")
    if array.shape[1] and ((array.strides[2] != array.itemsize and array.shape[2] > 1) or min(array.strides) < 0):
        raise ValueError(
            f"{name} must have contiguous rows (last stride {array.itemsize} bytes) and no negative stride, "
            f"got strides {array.strides}; pass numpy.ascontiguousarray({name})"
        )
    return array


def agree(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same rows: the same memory, or else (sampled) the same bytes.

    The caller's buffer grows in place by one token a step; hashing its rows then would take longer than the search.
    """
    same_memory = a.ctypes.data == b.ctypes.data and a.strides == b.strides and a.shape == b.shape
    return same_memory or fingerprint(a) == fingerprint(b)


def fingerprint(array: Array) -> str:
    """What tells these keys from others, cheaply: a hash of shape, dtype and up to 64 rows per head."""
    n = array.shape[1]
    rows = np.unique(np.linspace(0, n - 1, min(n, 64)).astype(np.int64)) if n else np.arange(0)
    digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    digest.update(np.ascontiguousarray(array[:, rows]).tobytes())
    return digest.hexdigest()


def _flatten(array: Array, bonus: Array) -> FlatKeys:
    stored = as_stored(array)
    n_heads, n_keys, dim = stored.shape
    stride_g, stride_s = (s // stored.itemsize for s in stored.strides[:2])
    extent = (n_heads - 1) * stride_g + (n_keys - 1) * stride_s + dim if n_keys else 0
    values = np.lib.stride_tricks.as_strided(stored, (extent,), (stored.itemsize,))
    return FlatKeys(values, stride_g, stride_s, bonus)


def _first_not_finite(stored: Array, flat: FlatKeys, head: int) -> int:
    """The first key of `head` that holds NaN or infinity; -1 if none does."""
    bits, exponent = {
        np.dtype(np.float32): (np.uint32, 0x7F800000),
        np.dtype(np.int16): (np.uint16, 0x7C00),
        np.dtype(np.uint16): (np.uint16, 0x7F80),
    }[flat.values.dtype]
    _, n_keys, dim = stored.shape
    return find_exponent(flat.values.view(bits), bits(exponent), head * flat.stride_g, flat.stride_s, n_keys, dim)


@jit()
def find_exponent(bits: Array, exponent: int, start: int, stride: int, n: int, dim: int) -> int:
    for i in range(n):
        row = bits[start + i * stride : start + i * stride + dim]
        n_found = 0
        for d in range(dim):
            n_found += (row[d] & exponent) == exponent
        if n_found:
            return i
    return -1
