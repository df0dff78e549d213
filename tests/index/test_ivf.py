"""The faiss baseline."""

import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like, recall

from retrieval_attn.index import build_index, ivf


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=6000)


@pytest.fixture(scope="module")
def index(scene):
    return build_index("ivf", as_bfloat16(scene.keys))


def test_all_lists_probed_is_exact(scene, index):
    exact = build_index("exact", as_bfloat16(scene.keys)).search(scene.later, k=50)
    hit = index.search(scene.later, k=50, effort=10**6)
    assert recall(hit.ids, exact.ids) > 0.999
    np.testing.assert_allclose(hit.scores, exact.scores, rtol=1e-5, atol=1e-3)
    assert (hit.visited == 6000).all()


def test_more_lists_mean_more_visited_and_more_found(scene, index):
    exact = build_index("exact", as_bfloat16(scene.keys)).search(scene.later, k=50)
    hits = [index.search(scene.later, k=50, effort=effort) for effort in (1, 10, 60)]
    found = [recall(hit.ids, exact.ids) for hit in hits]
    visited = [hit.visited.mean() for hit in hits]
    assert found == sorted(found)
    assert visited == sorted(visited)
    assert found[2] > 0.9
    assert visited[0] < 0.05 * 6000


def test_few_probed_keys_leave_short_rows(scene, index):
    hit = index.search(scene.later, k=500, effort=1)
    n_found = (hit.ids >= 0).sum(axis=-1)
    np.testing.assert_array_equal(n_found, hit.visited)
    assert np.isneginf(hit.scores[hit.ids < 0]).all()


def test_appended_keys_are_found_before_and_after_they_are_listed(scene, monkeypatch):
    monkeypatch.setattr(ivf, "MIN_TAIL", 500)
    keys = as_bfloat16(scene.keys)
    index = build_index("ivf", keys[:, :3000])
    for at in range(3000, 4200, 600):
        index.append(keys[:, at : at + 600])
        exact = build_index("exact", keys[:, : at + 600]).search(scene.later, k=20)
        assert recall(index.search(scene.later, k=20, effort=10**6).ids, exact.ids) > 0.999
    assert 3000 < index._state[1][0].index.ntotal <= 4200
    assert index._state.n_seen == 3000
    index.append(keys[:, 4200:])
    assert index._state.n_seen == 6000
    exact = build_index("exact", keys).search(scene.later, k=20)
    assert recall(index.search(scene.later, k=20, effort=10**6).ids, exact.ids) > 0.999


def test_the_common_mean_does_not_matter(scene):
    """Centred before clustering: a shift of all keys changes no list."""
    index, shifted = build_index("ivf", scene.keys), build_index("ivf", scene.keys + np.float32(8))
    assert recall(index.search(scene.later, k=20).ids, shifted.search(scene.later, k=20).ids) > 0.97


def test_nlist_is_followed(scene):
    index = build_index("ivf", scene.keys, nlist=7)
    assert (index.search(scene.later, k=5, effort=7).visited == 6000).all()
    assert index.nbytes >= scene.keys.nbytes


# Several indexes, as a model has one for each layer, built and searched in this thread and in others.
LAYERS = """
import threading, time
import psutil
import numpy as np
from retrieval_attn.index import build_index
rng = np.random.default_rng(0)
keys = rng.standard_normal((4, 3000, 16), dtype=np.float32)
queries = rng.standard_normal((4, 16), dtype=np.float32)

def use_one():
    index = build_index("ivf", keys)
    index.search(queries, 5)
    return index

def in_a_thread():
    thread = threading.Thread(target=use_one)
    thread.start()
    thread.join()

def n_threads(most):
    # Those of OpenMP end a little later than the thread that they worked for.
    until = time.monotonic() + 20
    while psutil.Process().num_threads() > most and time.monotonic() < until:
        time.sleep(0.05)
    return psutil.Process().num_threads()

indexes = [use_one()]
first = psutil.Process().num_threads()
for _ in range(4):
    indexes.append(use_one())
    in_a_thread()
print(n_threads(first) - first)
"""


def test_all_layers_share_their_threads():
    """Each index had as many threads as there are cores: 8 layers on 2 cores had 12 more than were at work."""
    done = subprocess.run([sys.executable, "-c", LAYERS], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) == 0


def test_no_more_threads_search_than_numba_may_use(index, scene, monkeypatch):
    names = set()
    probe = ivf.Lists.probe

    def noted(*arguments):
        names.add(threading.current_thread().name)
        return probe(*arguments)

    monkeypatch.setattr(ivf.Lists, "probe", noted)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone = index.search(scene.later, k=20)
    finally:
        numba.set_num_threads(before)
    assert len(names) == 1
    assert np.array_equal(alone.ids, index.search(scene.later, k=20).ids)


# A child waits for threads that only its parent has: ended by the alarm, it has no exit code of its own.
FORKED = """
import os, signal
from retrieval_attn.index.ivf import _pool
assert _pool().submit(int).result() == 0
child = os.fork()
if child == 0:
    signal.alarm(5)
    os._exit(7 + _pool().submit(int).result())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_process_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) == 7
