"""The pool of threads that numba's parallel loops run on."""

from concurrent.futures import ThreadPoolExecutor

import numba

from retrieval_attn.compiled import jit


@jit(parallel=True)
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

    The pool starts in a thread of its own: with the number of numba's threads it sets that of OpenMP in the thread that
    starts it, and PyTorch would then use as many, whatever its user had set.
    """
    global _pool_checked
    if _pool_checked:
        return
    with ThreadPoolExecutor(1) as starter:
        starter.submit(lambda: _touch_pool(numba.get_num_threads())).result()
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
