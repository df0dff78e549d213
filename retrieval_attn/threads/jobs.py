"""Background work that Ctrl-C in the waiting thread cannot harm, and that ends with what it was for.

Futures, events and pools of the standard library take their locks in Python code. An interruption between taking one
and the block that gives it back leaves it taken for good, and the other side waits for ever. Here a job is a few
attributes, each written once, and a lock that is only waited for.
"""

import atexit
import functools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

# A wait looks up so often whether the job is over, in case that an interruption kept the lock.
_LOOK_EVERY_S = 0.2

# How long the interpreter waits, at its end, for jobs that were told to stop.
_LEAVE_WITHIN_S = 10.0


class Cancelled(Exception):
    """The job was cancelled before it began."""


class Job:
    """One call in another thread. Made by `Worker.submit`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._over = threading.Lock()
        self._over.acquire()
        self._done = False
        self._cancelled = False
        self._value: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._done

    def cancel(self) -> None:
        """It need not begin; if it has begun, `is_cancelled` tells it."""
        self._cancelled = True

    def wait(self, seconds: float) -> bool:
        """Wait that long at most; returns whether it is over."""
        if not self._done and self._over.acquire(timeout=seconds):
            self._over.release()
        return self._done

    def result(self) -> Any:
        """What the call returned, or raises what it raised; waits for it. Raises Cancelled if it never began."""
        while not self.wait(_LOOK_EVERY_S):
            pass
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self) -> BaseException | None:
        """What the call raised; waits for it."""
        while not self.wait(_LOOK_EVERY_S):
            pass
        return self._error

    def run(self) -> None:
        """Do it, in this thread."""
        assert self._work is not None
        try:
            if self._cancelled:
                raise Cancelled("cancelled before it began")
            self._value = self._work()
        except BaseException as error:
            self._error = error
        # What the call was given is held no longer than it takes.
        self._work = None
        self._done = True
        self._over.release()


class _Queue:
    """Jobs that wait, jobs that are not over, and whether a thread is at work on them."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.open: list[Job] = []
        self.served = False

    def cancel(self) -> None:
        for job in list(self.open):
            job.cancel()


class Worker:
    """A thread that does jobs one after the other, while there are any; those not over when the worker is dropped, or
    the interpreter leaves, are cancelled.

    The thread ends with the last job: OpenMP keeps threads of its own for each that ever ran a parallel loop, and with
    more of them than cores all wait asleep. Decode steps took 1.6 times as long beside an idle one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue = _Queue()
        weakref.finalize(self, self._queue.cancel)

    def submit(self, work: Callable[..., Any], *args: Any, **options: Any) -> Job:
        """Let the thread call `work`, after the jobs before."""
        job = Job(functools.partial(work, *args, **options))
        self._queue.open.append(job)
        self._queue.waiting.put(job)
        if not self._queue.served:
            self._serve()
        return job

    def _serve(self) -> None:
        thread = threading.Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
        _threads[thread] = self._queue
        try:
            # Before it begins, for it may end at once.
            self._queue.served = True
            thread.start()
        except BaseException:
            # It may have begun nevertheless; then a second thread will come, which does no harm.
            self._queue.served = False
            raise

    def cancel(self) -> None:
        """Cancel all jobs that are not over."""
        self._queue.cancel()


_own = threading.local()
_threads: weakref.WeakKeyDictionary[threading.Thread, _Queue] = weakref.WeakKeyDictionary()


def is_cancelled() -> bool:
    """Whether the job that this thread does is wanted no more; to be asked now and then."""
    job: Job | None = getattr(_own, "job", None)
    return job is not None and job._cancelled


def _serve(jobs: _Queue) -> None:
    while True:
        try:
            job = jobs.waiting.get_nowait()
        except queue.Empty:
            jobs.served = False
            # One that came before the last line has started no other thread.
            if jobs.waiting.empty():
                return
            continue
        _own.job = job
        job.run()
        _own.job = None
        jobs.open.remove(job)
        # Between jobs nothing of the last one is held.
        del job


@atexit.register
def _leave() -> None:
    """Threads that still ran compiled code when the interpreter is taken down would take it down with a crash."""
    ending = list(_threads.items())
    for _, jobs in ending:
        jobs.cancel()
    for thread, _ in ending:
        thread.join(_LEAVE_WITHIN_S)
