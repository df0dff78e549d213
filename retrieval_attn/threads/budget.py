"""One number of threads for requests and index builds together: while both run, each gets half of the cores.

Counted over the whole process. Numba's number of threads belongs to the thread that calls, so each side sets its own.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba

from retrieval_attn.threads.pool import set_threads

_lock = threading.Lock()
_running = {"requests": 0, "builds": 0}


@contextmanager
def request(total: int | None) -> Iterator[None]:
    """Inside, this thread answers, with `total` threads (None: all cores), or half of them while an index is built."""
    before = numba.get_num_threads()
    with _counted("requests"):
        try:
            _share(total, "builds", round_up=True)
            yield
        finally:
            numba.set_num_threads(before)


@contextmanager
def build(total: int | None) -> Iterator[Callable[[], None]]:
    """Inside, this thread builds, with half of the threads while a request runs. Gives what to call now and then, for
    requests come and go."""

    def adjust() -> None:
        _share(total, "requests", round_up=False)

    with _counted("builds"):
        adjust()
        yield adjust


@contextmanager
def _counted(kind: str) -> Iterator[None]:
    counted = 0
    try:
        with _lock:
            counted = 1
            _running[kind] += 1
        yield
    finally:
        with _lock:
            _running[kind] -= counted


def _share(total: int | None, others: str, round_up: bool) -> None:
    total = total or numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    set_threads((total + round_up) // 2 if _running[others] else total)
