"""The best k of a stream, inside compiled code: a bounded heap whose root is the worst entry kept.

Entries are compared by score, then by id (the smaller id is better), so a result never depends on the order of
arrival or on how the work was split among threads.
"""

import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit


@jit(inline="always")
def worse(score_a: float, id_a: int, score_b: float, id_b: int) -> bool:
    return score_a < score_b or (score_a == score_b and id_a > id_b)


@jit()
def sift_down(scores: Array, ids: Array, hole: int, n: int, score: float, key: int) -> None:
    """Put (score, key) into the heap of size `n` whose slot `hole` is free."""
    while True:
        child = 2 * hole + 1
        if child >= n:
            break
        if child + 1 < n and worse(scores[child + 1], ids[child + 1], scores[child], ids[child]):
            child += 1
        if not worse(scores[child], ids[child], score, key):
            break
        scores[hole] = scores[child]
        ids[hole] = ids[child]
        hole = child
    scores[hole] = score
    ids[hole] = key


@jit()
def offer(scores: Array, ids: Array, n: int, score: float, key: int) -> int:
    """Offer one entry to the heap holding `n` of at most `len(scores)` entries. Returns the new size."""
    if n == len(scores):
        if worse(scores[0], ids[0], score, key):
            sift_down(scores, ids, 0, n, score, key)
        return n
    hole = n
    while hole > 0:
        parent = (hole - 1) >> 1
        if not worse(score, key, scores[parent], ids[parent]):
            break
        scores[hole] = scores[parent]
        ids[hole] = ids[parent]
        hole = parent
    scores[hole] = score
    ids[hole] = key
    return n + 1


@jit()
def best_first(scores: Array, ids: Array, n: int) -> None:
    """Turn the heap of size `n` into a list, best first."""
    for end in range(n - 1, 0, -1):
        score, key = scores[end], ids[end]
        scores[end] = scores[0]
        ids[end] = ids[0]
        sift_down(scores, ids, 0, end, score, key)


@jit()
def offer_run(scores: Array, ids: Array, n: int, run: Array, first_key: int) -> int:
    """Offer run[j] with id first_key + j for every j, ids larger than any offered before. Returns the new size.

    Most runs hold nothing good enough; a vectorised maximum says so before any entry is looked at.
    """
    for start in range(0, len(run), 16):
        stop = min(start + 16, len(run))
        j = start
        while n < len(scores) and j < stop:
            n = offer(scores, ids, n, run[j], first_key + j)
            j += 1
        if j == stop:
            continue
        worst = scores[0]
        n_better = np.int32(0)
        for i in range(j, stop):
            n_better += np.int32(run[i] > worst)
        if n_better == 0:
            continue
        for i in range(j, stop):
            if run[i] > scores[0]:
                sift_down(scores, ids, 0, n, run[i], first_key + i)
    return n
