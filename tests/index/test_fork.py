"""Forks and snapshots: two indexes over shared work, neither of which ever sees what becomes of the other."""

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like
from laws import some_of

from retrieval_attn.index import INDEX_KINDS, build_index, ivf, load_index
from retrieval_attn.index.graph import append as graph_append

every_kind = pytest.mark.parametrize("kind", INDEX_KINDS)

FIRST, SHARED = 2000, 2250

# Of each size some are appended: enough for graph to link, scan to choose anew, and ivf to extend and to cluster anew.
SIZES = (1, 15, 60, 130, 300, 800, 16)


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=4500)


@pytest.fixture(scope="module")
def other():
    """Another text, for the other side."""
    return attention_like(n_keys=4500, seed=1)


@pytest.fixture(autouse=True)
def _lists_are_extended_early(monkeypatch):
    monkeypatch.setattr(ivf, "MIN_TAIL", 200)


def built(kind, scene, lift=None):
    """An index that has grown before, so that its arrays have room to grow into, with keys that it copied."""
    options = {"tail": 100} if kind == "graph" else {}
    index = build_index(kind, scene.keys[:, :FIRST], scene.queries, lift=lift, **options)
    for at in range(FIRST, SHARED, 125):
        index.append(scene.keys[:, at : at + 125])
    return index


def found(index, scene):
    """What searches give that the index itself decides (not a scan of all keys), and with other effort."""
    return [*index.search(scene.later, 20), *index.search(scene.later, 40, effort=60)]


def same(a, b, scene):
    assert (a.kind, a.shape) == (b.kind, b.shape)
    assert all(np.array_equal(x, y) for x, y in zip(found(a, scene), found(b, scene), strict=True))


class Side:
    """An index that goes one way, and one that went the same way alone."""

    def __init__(self, index, alone, source, in_place):
        self.index, self.alone, self.source = index, alone, source
        self.at = 0
        self.store = None
        if in_place:
            self.store = np.full((2, 9000, 64), np.float32(np.nan))

    def append(self, n):
        new = self.source.keys[:, self.at : self.at + n]
        self.at += n
        self.alone.append(new)
        keys = None
        if self.store is not None:
            begin, end = self.index.n_keys, self.index.n_keys + n
            self.store[:, begin:end] = new
            keys = self.store[:, :end]
        self.index.append(new, keys=keys)

    def truncate(self, n_keys):
        self.alone.truncate(n_keys)
        self.index.truncate(n_keys)


def forked(kind, scene, other, in_place, lift=None):
    """Two sides that have all of the first index in common."""
    parent = built(kind, scene, lift)
    sides = Side(parent, built(kind, scene, lift), scene, False), Side(None, built(kind, scene, lift), other, in_place)
    own = scene.keys[:, :SHARED].copy()
    if in_place:
        sides[1].store[:, :SHARED] = own
        own = sides[1].store[:, :SHARED]
    sides[1].index = parent.fork(own)
    return sides


@every_kind
@pytest.mark.parametrize("lift", [None, 0.125])
def test_a_fork_finds_the_same(kind, lift, scene):
    index = built(kind, scene, lift)
    own = scene.keys[:, :SHARED].copy()
    fork = index.fork(own)
    same(fork, index, scene)
    assert fork.lift is index.lift
    assert fork.nbytes == index.nbytes


@every_kind
@pytest.mark.parametrize(("in_place", "child_first"), some_of([True, False], [False, True], few=1))
def test_each_side_goes_on_as_if_alone(kind, in_place, child_first, scene, other):
    """Both append different keys under the same ids, into what was room behind the shared ones."""
    sides = forked(kind, scene, other, in_place)
    for n in SIZES:
        for side in reversed(sides) if child_first else sides:
            side.append(n)
            for each in sides:
                same(each.index, each.alone, scene)
    parent, child = sides
    assert not np.array_equal(parent.index.search(scene.later, 20).ids, child.index.search(scene.later, 20).ids)


@every_kind
@pytest.mark.parametrize(("n_kept", "who"), some_of([SHARED, FIRST - 7, SHARED - 5, 1700], [0, 1], few=2))
def test_going_back_on_one_side_leaves_the_other(kind, n_kept, who, scene, other):
    sides = forked(kind, scene, other, in_place=False)
    sides[0].append(140)
    sides[1].append(33)
    sides[who].truncate(n_kept)
    for n in (20, 200):
        for side in sides:
            same(side.index, side.alone, scene)
            side.append(n)
    for side in sides:
        same(side.index, side.alone, scene)


@every_kind
def test_lifted_sides_go_on_as_if_alone(kind, scene, other):
    sides = forked(kind, scene, other, in_place=True, lift=0.125)
    for n in (40, 300, 17):
        for side in sides:
            side.append(n)
            same(side.index, side.alone, scene)


@every_kind
def test_forks_of_forks_are_as_free(kind, scene, other):
    parent = built(kind, scene)
    child = parent.fork(scene.keys[:, :SHARED].copy())
    grandchild = child.fork(scene.keys[:, :SHARED].copy())
    sides = [
        Side(index, built(kind, scene), source, False)
        for index, source in ((child, other), (grandchild, scene), (parent, other))
    ]
    for n in (130, 7):
        for side in sides:
            side.append(n)
    # One more, of a side that has what is its own by now.
    late = Side(child.fork(), built(kind, scene), other, False)
    late.alone.append(other.keys[:, :130])
    late.alone.append(other.keys[:, 130:137])
    late.at = 1000
    sides[0].append(150)
    late.append(150)
    for side in (*sides, late):
        same(side.index, side.alone, scene)


@every_kind
def test_a_fork_is_saved_without_what_its_origin_added(kind, scene, tmp_path):
    index = built(kind, scene)
    fork = index.fork(scene.keys[:, :SHARED].copy())
    index.append(scene.keys[:, SHARED : SHARED + 150])
    fork.save(tmp_path / "fork")
    built(kind, scene).save(tmp_path / "alone")
    assert (tmp_path / "fork").read_bytes() == (tmp_path / "alone").read_bytes()
    same(load_index(tmp_path / "fork"), fork, scene)


@every_kind
def test_a_snapshot_stays_while_the_index_goes_on(kind, scene, other):
    index = built(kind, scene)
    snapshot, expected = index.snapshot(), found(index, scene)

    def check():
        assert snapshot.n_keys == SHARED
        assert all(np.array_equal(x, y) for x, y in zip(found(snapshot, scene), expected, strict=True))

    for n in SIZES:
        index.append(scene.keys[:, index.n_keys : index.n_keys + n])
        check()
    for n_keys in (SHARED + 3, SHARED - 20, 1200):
        index.truncate(n_keys)
        check()
        index.append(other.keys[:, :600])
        check()


@every_kind
def test_a_snapshot_taken_after_going_back_stays_too(kind, scene, other):
    index = built(kind, scene)
    index.truncate(SHARED - 9)
    snapshot, expected = index.snapshot(), found(index, scene)
    for n in (4, 5, 300):
        index.append(other.keys[:, :n])
        assert all(np.array_equal(x, y) for x, y in zip(found(snapshot, scene), expected, strict=True))


@every_kind
def test_forking_copies_nothing(kind, scene):
    index = built(kind, scene)
    own = scene.keys[:, :SHARED].copy()
    index.fork(own)
    tracemalloc.start()
    try:
        forks = [index.fork(own), index.snapshot()]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Up to 64 rows per head are looked at.
    assert peak < 2**18 < own.nbytes / 4
    assert len(forks) == 2


@every_kind
def test_neither_side_keeps_the_other(kind, scene):
    index = built(kind, scene)
    fork = index.fork(scene.keys[:, :SHARED].copy())
    child = fork.fork()
    expected = found(fork, scene)
    gone = [weakref.ref(index), weakref.ref(child)]
    del index, child
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert all(np.array_equal(x, y) for x, y in zip(found(fork, scene), expected, strict=True))


@every_kind
def test_forks_made_while_another_thread_appends_are_of_one_moment(kind, scene, other):
    """The array given holds keys to come as well: which of them are indexed already, nobody knows."""
    blocks = [(at, at + 50) for at in range(SHARED, SHARED + 1000, 50)]
    alone, then = built(kind, scene), {}
    then[SHARED] = found(alone, scene)
    for begin, end in blocks:
        alone.append(scene.keys[:, begin:end])
        then[end] = found(alone, scene)
    index, own, forks, over = built(kind, scene), scene.keys.copy(), [], threading.Event()

    def write():
        for begin, end in blocks:
            index.append(scene.keys[:, begin:end])
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not over.is_set():
        fork = index.fork(own)
        n_keys = fork.n_keys
        forks.append((n_keys, found(fork, scene)))
        # Its own keys, linked or encoded while the other does the same.
        fork.append(other.keys[:, :120])
    writer.join()
    for n_keys, hits in forks:
        assert all(np.array_equal(x, y) for x, y in zip(hits, then[n_keys], strict=True))
    same(index, alone, scene)


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:, :-1], r"keys must be \(2, 2250, 64\) float32 \(the indexed keys.*got \(2, 2249, 64\)"),
        (lambda a: a[:1], r"got \(1, 2250, 64\)"),
        (lambda a: a[..., :32].copy(), r"got \(2, 2250, 32\)"),
        (as_bfloat16, "got .* uint16"),
        (lambda a: a[:, ::-1].copy(), "must begin with the 2250 keys already indexed"),
    ],
)
def test_other_keys_are_refused(kind, change, message, scene):
    with pytest.raises(ValueError, match=message):
        build_index(kind, scene.keys[:, :SHARED], scene.queries).fork(change(scene.keys[:, :SHARED].copy()))


def test_what_an_interrupted_append_linked_is_forgotten(scene, monkeypatch, tmp_path):
    """Half of the new keys were linked in place when it ended; the next append must not find them there."""
    index, alone = built("graph", scene), built("graph", scene)
    index.append(scene.keys[:, SHARED : SHARED + 300])
    alone.append(scene.keys[:, SHARED : SHARED + 300])
    link_cells, heads = graph_append.link_cells, []

    def interrupted(*args):
        link_cells(*args)
        heads.append(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_append, "link_cells", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.append(scene.keys[:, 4000:4200])
    monkeypatch.undo()
    assert heads
    same(index, alone, scene)
    for each, name in ((index, "a"), (alone, "b")):
        each.append(scene.keys[:, 5000:5150])
        each.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
