"""What every kind promises: complete if all is asked, unchanged by search, thread-safe, clear about mistakes."""

import threading

import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like

from retrieval_attn.index import INDEX_KINDS, BuildCancelled, build_index

every_kind = pytest.mark.parametrize("kind", INDEX_KINDS)


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=2000, n_queries=128)


@pytest.fixture(scope="module")
def indexes(scene):
    return {kind: build_index(kind, as_bfloat16(scene.keys), scene.queries) for kind in INDEX_KINDS}


@every_kind
@pytest.mark.parametrize("n_keys", [1, 2, 63, 1000])
@pytest.mark.parametrize("more", [0, 10])
def test_everything_asked_is_everything_found(kind, n_keys, more):
    scene = attention_like(n_keys=n_keys, n_queries=32)
    keys = as_bfloat16(scene.keys)
    hit = build_index(kind, keys, scene.queries).search(scene.later, k=n_keys + more)
    exact = build_index("exact", keys).search(scene.later, k=n_keys + more)
    np.testing.assert_array_equal(hit.ids, exact.ids)
    np.testing.assert_array_equal(hit.scores, exact.scores)
    assert (np.sort(hit.ids, axis=-1)[..., more:] == np.arange(n_keys)).all()


@every_kind
@pytest.mark.parametrize("n_keys", [1, 3, 40])
def test_few_keys_and_small_k(kind, n_keys):
    scene = attention_like(n_keys=n_keys, n_queries=4)
    hit = build_index(kind, scene.keys, scene.queries).search(scene.later, k=1)
    np.testing.assert_array_equal(hit.ids, build_index("exact", scene.keys).search(scene.later, k=1).ids)


@every_kind
def test_scores_are_inner_products_of_the_stored_keys(kind, scene, indexes):
    hit = indexes[kind].search(scene.later, k=50)
    stored = (as_bfloat16(scene.keys).astype(np.uint32) << 16).view(np.float32)
    rows = np.repeat(stored, 2, axis=0)[np.arange(4)[:, None, None], hit.ids]
    expected = np.einsum("htd,htkd->htk", scene.later.astype(np.float64), rows.astype(np.float64))
    np.testing.assert_allclose(hit.scores, expected, rtol=1e-5, atol=1e-3)
    assert (np.diff(hit.scores, axis=-1) <= 0).all()
    assert all(len(set(row)) == 50 for row in hit.ids.reshape(-1, 50))


@every_kind
def test_heads_of_one_call_do_not_mix(kind, scene, indexes):
    whole = indexes[kind].search(scene.later, k=20)
    for t in (0, 7):
        alone = indexes[kind].search(scene.later[:, t], k=20)
        assert np.mean(alone.ids == whole.ids[:, t]) > 0.98  # equal scores may round apart
        np.testing.assert_allclose(alone.scores, whole.scores[:, t], rtol=1e-5, atol=1e-4)


@every_kind
def test_more_effort_finds_no_less(kind, scene, indexes):
    exact = indexes["exact"].search(scene.later, k=50)
    kth = exact.scores[..., -1:]
    share = [
        (indexes[kind].search(scene.later, k=50, effort=effort).scores >= kth - 1e-3).mean() for effort in (50, 1000)
    ]
    assert share[1] >= share[0]
    assert share[1] > 0.99


@every_kind
def test_search_changes_nothing(kind, scene, indexes, tmp_path):
    index = indexes[kind]
    index.save(tmp_path / "before")
    first = index.search(scene.later, k=50)
    second = index.search(scene.later, k=50)
    index.save(tmp_path / "after")
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@every_kind
def test_the_same_seed_gives_the_same_index(kind, scene, indexes, tmp_path):
    again = build_index(kind, as_bfloat16(scene.keys), scene.queries)
    for a, b in zip(indexes[kind].search(scene.later, k=50), again.search(scene.later, k=50), strict=True):
        np.testing.assert_array_equal(a, b)


@every_kind
def test_many_threads_get_what_one_gets(kind, scene, indexes):
    index = indexes[kind]
    expected = [index.search(scene.later[:, t], k=20).ids for t in range(8)]
    wrong = []

    def work():
        for t in range(8):
            if not np.array_equal(index.search(scene.later[:, t], k=20).ids, expected[t]):
                wrong.append(t)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_kind
def test_a_search_during_append_sees_all_of_it_or_nothing(kind):
    """Each append adds one winning key per head; a search must see every append that was over when it began."""
    scene = attention_like(n_keys=1500, n_queries=64)
    options = {"tail": 15} if kind == "graph" else {}
    index = build_index(kind, scene.keys.copy(), scene.queries, **options)
    q = scene.later[:, 0]
    # The larger, the later: the best id says which appends this search saw.
    winners = np.stack([q[0] + q[1], q[2] + q[3]])[:, None]
    stop = threading.Event()
    wrong = []

    def work():
        while not stop.is_set():
            at_least = index.n_keys
            best = index.search(q, k=3).ids[:, 0]
            if at_least > 1500 and (best < at_least - 1).any():
                wrong.append((at_least, best))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):
        index.append(winners * (10 + i))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (index.search(q, k=1).ids == 1539).all()


@every_kind
def test_nothing_to_append_is_no_change(kind, scene):
    index = build_index(kind, scene.keys[:, :500], scene.queries)
    index.append(scene.keys[:, :0])
    assert index.n_keys == 500


@every_kind
def test_progress_rises_and_cancel_ends(kind, scene):
    seen = []
    build_index(kind, scene.keys, scene.queries, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    assert min(seen) >= 0.0
    assert max(seen) <= 1.0
    with pytest.raises(BuildCancelled):
        build_index(kind, scene.keys, scene.queries, cancel=lambda: True)


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"q": q, "k": 0}, "k must be at least 1, got 0"),
        (lambda q: {"q": q[..., :32]}, r"q must be \(H, 64\) or \(H, T, 64\).*got shape"),
        (lambda q: {"q": q[:3]}, "multiple of 2 heads.*got 3"),
        (lambda q: {"q": q[0, 0]}, "got shape"),
        (lambda q: {"q": q.astype(int)}, "floating point"),
        (lambda q: {"q": q, "effort": 0}, "effort must be at least 1, got 0"),
    ],
)
def test_mistakes_in_a_search_are_named(kind, scene, indexes, change, message):
    with pytest.raises(ValueError, match=message):
        indexes[kind].search(**change(scene.later))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bad_numbers_are_named(scene, bad, dtype):
    keys, q = scene.keys.astype(dtype), scene.later.copy()
    keys[1, 1234, 5] = bad
    with pytest.raises(ValueError, match="keys must be finite.*head 1, row 1234"):
        build_index("exact", keys)
    with pytest.raises(ValueError, match="keys must be finite.*head 1, row 1234"):
        build_index("exact", as_bfloat16(keys.astype(np.float32)))
    q[3, 9, 0] = bad
    with pytest.raises(ValueError, match="q must be finite.*head 3, row 9"):
        build_index("exact", scene.keys).search(q)
    with pytest.raises(ValueError, match="queries must be finite.*head 3, row 9"):
        build_index("graph", scene.keys, q)


def test_huge_but_finite_queries_are_no_mistake(scene):
    q = np.full_like(scene.later, np.finfo(np.float32).max / 4)
    build_index("exact", np.zeros_like(scene.keys)).search(q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: build_index("tree", s.keys), "unknown index kind 'tree'; choose from exact, ivf, graph"),
        (lambda s: build_index("exact", s.keys, depth=3), "unknown option 'depth' for index kind 'exact'.*none"),
        (lambda s: build_index("graph", s.keys, depth=3), "unknown option 'depth'.*choose from degree"),
        (lambda s: build_index("graph", s.keys, degree=1), "degree must be at least 4, got 1"),
        (lambda s: build_index("ivf", s.keys, nlist=0), "nlist must be between 1 and 2000"),
        (lambda s: build_index("exact", s.keys[:, :0]), "at least one key"),
        (lambda s: build_index("exact", s.keys[0]), r"keys must be \(G, S, D\)"),
        (lambda s: build_index("exact", s.keys.astype(np.float64)), "float32, float16, bfloat16.*got float64"),
        (lambda s: build_index("exact", s.keys[..., ::2]), "contiguous rows"),
        (lambda s: build_index("graph", s.keys, s.queries[:3]), "queries must have a multiple of 2 heads"),
        (lambda s: build_index("graph", s.keys, s.queries[..., :8]), r"queries must be \(H, T, 64\)"),
        (lambda s: build_index("exact", s.keys).append(s.keys[..., :8]), r"new_keys must be \(2, n, 64\)"),
        (lambda s: build_index("exact", s.keys).append(as_bfloat16(s.keys)), "dtype of the index"),
    ],
)
def test_mistakes_in_building_are_named(scene, call, message):
    with pytest.raises(ValueError, match=message):
        call(scene)


def test_other_things_than_arrays_are_refused(scene):
    with pytest.raises(TypeError, match="NumPy array or a torch tensor, got list"):
        build_index("exact", [[1.0]])
