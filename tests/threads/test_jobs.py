"""Background jobs: results, errors, order, cancelling, and threads that end."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from retrieval_attn.threads.jobs import Cancelled, Worker, is_cancelled


def n_threads(name):
    return sum(thread.name == name for thread in threading.enumerate())


def until(holds, seconds=5.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_jobs_are_done_in_order_and_give_what_they_give():
    worker, order = Worker("jobs-order"), []

    def work(n, wait=0.0):
        time.sleep(wait)
        order.append(n)
        return 2 * n

    done = [worker.submit(work, 1, wait=0.05), worker.submit(work, 2)]
    assert [job.result() for job in done] == [2, 4]
    assert order == [1, 2]
    assert all(job.done() and job.exception() is None for job in done)


def test_an_error_is_raised_where_the_result_is_wanted_and_the_thread_goes_on():
    worker = Worker("jobs-error")
    bad, good = worker.submit(lambda: 1 / 0), worker.submit(lambda: 3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.result()
    assert isinstance(bad.exception(), ZeroDivisionError)
    assert good.result() == 3


def test_a_wait_ends_in_time():
    worker, go = Worker("jobs-wait"), threading.Event()
    job = worker.submit(go.wait)
    assert not job.wait(0.01)
    go.set()
    assert until(lambda: job.wait(0.1))


def test_an_interrupted_wait_keeps_nobody_waiting():
    """As if Ctrl-C had struck between taking the lock and giving it back."""
    worker = Worker("jobs-lock")
    job = worker.submit(lambda: 5)
    assert until(job.done)
    job._over.acquire()
    assert job.wait(0)
    assert job.result() == 5


def test_cancelled_jobs_do_not_begin_and_the_one_at_work_is_told():
    worker, begun = Worker("jobs-cancel"), threading.Event()

    def work():
        begun.set()
        while not is_cancelled():
            time.sleep(0.01)
        return "stopped"

    first, second = worker.submit(work), worker.submit(lambda: "never")
    begun.wait()
    worker.cancel()
    assert first.result() == "stopped"
    with pytest.raises(Cancelled):
        second.result()
    # Later jobs are not.
    assert worker.submit(is_cancelled).result() is False
    assert not is_cancelled()


def test_the_thread_ends_with_its_worker():
    worker = Worker("jobs-end")
    assert n_threads("jobs-end") == 0
    job = worker.submit(lambda: until(is_cancelled))
    assert n_threads("jobs-end") == 1
    del worker
    gc.collect()
    assert job.result() is True
    assert until(lambda: n_threads("jobs-end") == 0)


AT_THE_END = """
import time
from retrieval_attn.threads.jobs import Worker, is_cancelled
idle, busy = Worker("idle"), Worker("busy")
idle.submit(int).result()
def work():
    while not is_cancelled():
        time.sleep(0.01)
busy.submit(work)
print(time.time(), flush=True)
"""


def test_neither_idle_nor_busy_workers_keep_the_interpreter():
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=True, timeout=60)
    assert time.time() - float(done.stdout) < 5
