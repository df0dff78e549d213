"""Requests and builds share one number of threads."""

import threading

import numba
import pytest

from retrieval_attn.threads import budget
from retrieval_attn.threads.pool import set_threads

ALL = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _as_before():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def elsewhere(work):
    """What `work` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def threads_of_a_build(total):
    with budget.build(total):
        return numba.get_num_threads()


def threads_of_a_request(total):
    with budget.request(total):
        return numba.get_num_threads()


@pytest.mark.parametrize("total", [None, 1, 2])
def test_alone_each_has_all(total):
    most = min(total or ALL, ALL)
    assert elsewhere(lambda: threads_of_a_build(total)) == most
    assert elsewhere(lambda: threads_of_a_request(total)) == most


def test_together_each_has_half_and_at_least_one(monkeypatch):
    """With numbers noted instead of set: this machine may have fewer cores."""
    noted = []
    monkeypatch.setattr("retrieval_attn.threads.budget.set_threads", noted.append)
    with budget.request(8):
        with budget.build(8) as adjust, budget.request(8):
            pass
        adjust()
    adjust()
    with budget.build(7), budget.request(7):
        pass
    assert noted == [8, 4, 4, 4, 8, 7, 4]


def test_a_request_leaves_the_callers_setting():
    set_threads(1)
    with budget.request(None):
        assert numba.get_num_threads() == ALL
    assert numba.get_num_threads() == 1
    with pytest.raises(KeyboardInterrupt), budget.request(None):
        raise KeyboardInterrupt
    assert numba.get_num_threads() == 1
    assert threads_of_a_request(None) == ALL
