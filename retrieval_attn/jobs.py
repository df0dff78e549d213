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


_Jobs = queue.SimpleQueue[Job | None]


class Worker:
    """A thread that does jobs one after the other. It begins with the first job, and ends when the worker is dropped or
    the interpreter leaves; jobs not done by then are cancelled."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: _Jobs = queue.SimpleQueue()
        self._open: list[Job] = []
        self._begun = False
        weakref.finalize(self, _end, self._jobs, self._open)

    def submit(self, work: Callable[..., Any], *args: Any, **options: Any) -> Job:
        """Let the thread call `work`, after the jobs before."""
        job = Job(functools.partial(work, *args, **options))
        self._open.append(job)
        self._jobs.put(job)
        if not self._begun:
            # Interrupted before the next line, a second thread may begin, which does no harm.
            thread = threading.Thread(target=_serve, args=(self._jobs, self._open), name=self._name, daemon=True)
            _threads[thread] = self._jobs, self._open
            thread.start()
            self._begun = True
        return job

    def cancel(self) -> None:
        """Cancel all jobs that are not over."""
        for job in list(self._open):
            job.cancel()


_own = threading.local()
_threads: weakref.WeakKeyDictionary[threading.Thread, tuple[_Jobs, list[Job]]] = weakref.WeakKeyDictionary()


def is_cancelled() -> bool:
    """Whether the job that this thread does is wanted no more; to be asked now and then."""
    job: Job | None = getattr(_own, "job", None)
    return job is not None and job._cancelled


def _serve(jobs: _Jobs, unfinished: list[Job]) -> None:
    while (job := jobs.get()) is not None:
        _own.job = job
        job.run()
        _own.job = None
        unfinished.remove(job)
        # Between jobs nothing of the last one is held.
        del job


def _end(jobs: _Jobs, unfinished: list[Job]) -> None:
    for job in list(unfinished):
        job.cancel()
    jobs.put(None)


@atexit.register
def _leave() -> None:
    """Threads that still ran compiled code when the interpreter is taken down would take it down with a crash."""
    ending = list(_threads.items())
    for _, (jobs, unfinished) in ending:
        _end(jobs, unfinished)
    for thread, _ in ending:
        thread.join(_LEAVE_WITHIN_S)
