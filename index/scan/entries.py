"""Candidates as numbers, inside compiled code: the score above, the key below, in 64 bits.

The better entry is the larger number, equal scores go to the smaller key, and no two entries are equal. So the best of
many are found by comparing and moving plain integers.
"""

from typing import NamedTuple

import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit

_LOW = 0xFFFFFFFF


class Found(NamedTuple):
    """Entries (..., n) int64 that were found, and how many of each n there are: counts (...)."""

    entries: Array
    counts: Array


@jit(inline="always")
def as_entry(bits: int, key: int) -> np.int64:
    """One number from the bits of a float32 score and a key."""
    # Negative numbers are ordered by falling magnitude; both zeros are one.
    order = np.int64(bits) if bits >= 0 else -np.int64(bits & 0x7FFFFFFF)
    return order << 32 | (_LOW - key)


@jit(inline="always")
def key_of(entry: int) -> int:
    return _LOW - (entry & _LOW)


@jit(inline="always")
def order_of(entry: int) -> int:
    """The place of the entry's score among all float32 numbers."""
    return entry >> 32


@jit(inline="always")
def bits_at(order: int) -> np.int32:
    """The bits of the float32 at this place."""
    return np.int32(order if order >= 0 else -order - 0x80000000)


@jit()
def score_at(order: int) -> float:
    """The float32 at this place."""
    score = np.empty(1, np.float32)
    score.view(np.int32)[0] = bits_at(order)
    return score[0]


@jit()
def keep_best(entries: Array, n: int, k: int) -> None:
    """Move the k largest of the first n entries to the front, in any order."""
    first, last = 0, n
    while first < k < last:
        a, b, c = entries[first], entries[(first + last) // 2], entries[last - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        # Every entry is moved, wherever it belongs: a branch would be guessed wrong every other time.
        larger = first
        for i in range(first, last):
            entry = entries[i]
            entries[i] = entries[larger]
            entries[larger] = entry
            larger += entry > pivot
        if larger >= k:
            last = larger
        else:
            # The pivot is the largest of the rest, and comes next.
            at = larger
            while entries[at] != pivot:
                at += 1
            entries[at] = entries[larger]
            entries[larger] = pivot
            first = larger + 1


@jit()
def write_best(entries: Array, ids: Array, scores: Array) -> None:
    """The len(ids) best entries, best first; there are at least as many."""
    k = len(ids)
    keep_best(entries, len(entries), k)
    best = np.sort(entries[:k])
    bits = scores.view(np.int32)
    for i in range(k):
        entry = best[k - 1 - i]
        ids[i] = key_of(entry)
        bits[i] = bits_at(order_of(entry))
