"""The graph index on vectors that look like attention, on vectors that do not, and as it grows."""

import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like, recall

from retrieval_attn.index import BuildCancelled, build_index, load_index
from retrieval_attn.index.graph.cells import head_of


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=8192, n_queries=512, n_later=32)


@pytest.fixture(scope="module")
def keys(scene):
    return as_bfloat16(scene.keys)


@pytest.fixture(scope="module")
def index(scene, keys):
    return build_index("graph", keys, scene.queries)


@pytest.fixture(scope="module")
def truth(scene, keys):
    return build_index("exact", keys).search(scene.later, k=100)


def check_connected(index):
    """Each linked key stands in one leaf of its head's tree, so that a search can begin at it, and links are sound."""
    _, tree, links, n_linked = index._state
    for head in range(len(links)):
        assert sorted(head_of(tree, head).members) == list(range(n_linked))
        rows = links[head, :n_linked]
        assert rows.min() >= -1
        assert rows.max() < n_linked
        assert (rows != np.arange(n_linked)[:, None]).all()
        assert (np.diff((rows < 0).astype(int), axis=1) >= 0).all()


def test_later_queries_find_their_keys(scene, index, truth):
    hit = index.search(scene.later, k=100)
    assert recall(hit.ids, truth.ids) > 0.98
    assert hit.visited.mean() < 0.35 * index.n_keys
    best = hit.ids[..., 0] == truth.ids[..., 0]
    assert best.mean() > 0.99
    np.testing.assert_allclose(hit.scores[..., 0][best], truth.scores[..., 0][best], rtol=1e-5)


def test_needles_are_found(scene):
    """One key per head that only a later query wants, far from all the prefill asked for."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((4, 64), dtype=np.float32) * 3
    planted = scene.keys.copy()
    for head in range(4):
        planted[head // 2, 1000 + head] = planted[head // 2].mean(axis=0) + q[head]
    index = build_index("graph", as_bfloat16(planted), scene.queries)
    assert (index.search(q, k=10).ids[:, 0] == 1000 + np.arange(4)).all()


def test_more_effort_finds_more(scene, index, truth):
    hits = [index.search(scene.later, k=25, effort=e) for e in (25, 50, 100, 300)]
    found = [recall(hit.ids, truth.ids[..., :25]) for hit in hits]
    assert found == sorted(found)
    assert found[0] > 0.85
    assert found[-1] > 0.99
    visited = [hit.visited.mean() for hit in hits]
    assert visited == sorted(visited)
    assert visited[0] < 0.1 * index.n_keys


def test_links_find_what_leaves_miss(scene, keys, truth):
    """A search that only reads leaves misses more, and links that lead anywhere do not help."""
    index = build_index("graph", keys, scene.queries, leaf=8)
    state = index._state
    missed = lambda: 1 - recall(index.search(scene.later, k=25, effort=25).ids, truth.ids[..., :25])  # noqa: E731
    with_both = missed()
    index._state = state._replace(links=np.full_like(state.links, -1))
    without_links = missed()
    rng = np.random.default_rng(0)
    index._state = state._replace(links=rng.integers(0, 8192, state.links.shape).astype(np.int32))
    random_links = missed()
    assert with_both < 0.75 * without_links
    assert with_both < 0.75 * random_links


def test_queries_of_every_head_shape_the_graph():
    """Two heads of a group look at different directions. Built for the first only, the second finds less."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 8192, 64), dtype=np.float32)
    asked = rng.standard_normal((2, 300, 64), dtype=np.float32)
    asked[0, :, 12:] = 0
    asked[1, :, :-12] = 0
    sample, later = asked[:, :256], asked[:, 256:]
    wanted = build_index("exact", keys).search(later, k=20).ids
    both = build_index("graph", keys, sample).search(later, k=20, effort=20).ids
    first = build_index("graph", keys, sample[[0, 0]]).search(later, k=20, effort=20).ids
    assert recall(both[1], wanted[1]) > recall(first[1], wanted[1]) + 0.1
    assert abs(recall(both[0], wanted[0]) - recall(both[1], wanted[1])) < 0.1


def test_without_queries_it_still_works(scene, keys, truth):
    index = build_index("graph", keys)
    assert recall(index.search(scene.later, k=100, effort=400).ids, truth.ids) > 0.9
    check_connected(index)


def test_the_same_seed_gives_the_same_index(scene, keys, index):
    again = build_index("graph", keys, scene.queries)
    for a, b in zip(index._state.cells, again._state.cells, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(index._state.links, again._state.links)


def test_every_key_is_in_the_tree(index):
    check_connected(index)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: np.zeros((1, 3000, 32), np.float32),
        lambda rng: np.repeat(rng.standard_normal((1, 30, 32), dtype=np.float32), 100, axis=1),
        lambda rng: np.tile(rng.standard_normal((1, 1500, 32), dtype=np.float32), (1, 2, 1)),
        lambda rng: (
            rng.standard_normal((1, 3000, 32), dtype=np.float32)
            * np.where(np.arange(3000) == 77, 999, 1)[:, None].astype(np.float32)
        ),
        lambda rng: rng.uniform(-1, 1, (1, 3000, 32)).astype(np.float32),
        lambda rng: np.eye(32, dtype=np.float32)[rng.integers(0, 32, 3000)][None],
        lambda rng: np.cumsum(rng.standard_normal((1, 3000, 32), dtype=np.float32), axis=1),
    ],
    ids=["zeros", "runs of duplicates", "two copies", "one giant", "uniform", "few directions", "a walk"],
)
def test_strange_keys_stay_connected_and_are_found(make):
    rng = np.random.default_rng(3)
    keys = make(rng)
    index = build_index("graph", keys, rng.standard_normal((2, 200, 32), dtype=np.float32))
    check_connected(index)
    q = rng.standard_normal((2, 20, 32), dtype=np.float32)
    hit = index.search(q, k=50, effort=150)
    assert hit.visited.max() < index.n_keys, "a scan would prove nothing"
    exact = build_index("exact", keys).search(q, k=50)
    # Among equal scores any id is right.
    assert (hit.scores >= exact.scores[..., -1:] - 1e-4 * np.abs(exact.scores[..., -1:])).mean() > 0.85
    assert all(len(set(row)) == 50 for row in hit.ids.reshape(-1, 50))


def test_a_giant_key_hides_no_other():
    """One key of huge norm takes the first place or none; the rest are found as if it were not there."""
    rng = np.random.default_rng(0)
    keys = attention_like(n_heads=1, n_kv=1, n_keys=6000, seed=1)
    giant = keys.keys.copy()
    giant[0, 4000] = 1000 * rng.standard_normal(64)
    found = [
        recall(
            build_index("graph", x, keys.queries).search(keys.later, k=25, effort=40).ids,
            build_index("exact", x).search(keys.later, k=25).ids,
        )
        for x in (keys.keys, giant)
    ]
    assert found[1] > found[0] - 0.03
    hit = build_index("graph", giant, keys.queries).search(keys.later, k=25, effort=40)
    assert ((hit.ids[..., 0] == 4000) == (keys.later @ giant[0, 4000] > hit.scores[..., 1])).all()


def test_lifted_keys_are_ranked_by_score_and_bonus(scene, keys):
    lifted = build_index("graph", keys, scene.queries, lift=0.125, seed=4)
    exact = build_index("exact", keys, lift=0.125, seed=4).search(scene.later, k=65)
    hit = lifted.search(scene.later, k=65, effort=150)
    assert hit.visited.mean() < 0.3 * 8192
    assert recall(hit.ids, exact.ids) > 0.97
    same = hit.ids[..., 0] == exact.ids[..., 0]
    assert same.mean() > 0.98
    np.testing.assert_allclose(hit.scores[same][:, 0], exact.scores[same][:, 0], rtol=1e-5)


def test_with_flat_attention_the_bonus_decides_and_is_found(scene, keys):
    """At a small scale the bonuses are far larger than the scores' differences."""
    lifted = build_index("graph", keys, scene.queries, lift=0.002, seed=4)
    exact = build_index("exact", keys, lift=0.002, seed=4).search(scene.later, k=33)
    hit = lifted.search(scene.later, k=33, effort=150)
    assert recall(hit.ids, exact.ids) > 0.9


def test_appended_keys_have_their_bonus_too(scene, keys):
    index = build_index("graph", keys[:, :5000], scene.queries[:, :300], lift=0.125, seed=4, tail=512)
    for at in range(5000, 8192, 456):
        index.append(keys[:, at : at + 456])
    exact = build_index("exact", keys, lift=0.125, seed=4).search(scene.later, k=65)
    assert index._state.n_linked > 7000
    assert recall(index.search(scene.later, k=65, effort=150).ids, exact.ids) > 0.93


def test_k_near_the_number_of_keys(scene, keys):
    index = build_index("graph", keys[:, :300], scene.queries)
    for k in (1, 30, 37, 38, 299, 300, 400):
        hit = index.search(scene.later, k=k, effort=k)
        exact = build_index("exact", keys[:, :300]).search(scene.later, k=k)
        assert hit.ids.shape == (4, 32, k)
        if k >= 38:
            np.testing.assert_array_equal(hit.ids, exact.ids)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_few_keys_are_indexed_and_extended(n):
    keys = np.random.default_rng(0).standard_normal((2, n + 40, 16), dtype=np.float32)
    index = build_index("graph", keys[:, :n], keys[:, :1], tail=10)
    for at in range(n, n + 40, 8):
        index.append(keys[:, at : at + 8])
    check_connected(index)
    q = keys[:, -1]
    hit = index.search(q, k=3, effort=3)
    assert (hit.ids[:, 0] == build_index("exact", keys).search(q, k=1).ids[:, 0]).all()


def test_a_build_tells_how_far_it_is_and_ends_when_asked(scene, keys):
    told = []
    build_index("graph", keys, scene.queries, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    assert len(told) > 20
    for last in (0, 3, len(told) // 2, len(told) - 2):
        left = iter(range(last))
        with pytest.raises(BuildCancelled):
            build_index("graph", keys, scene.queries, cancel=lambda left=left: next(left, None) is None)


@pytest.mark.parametrize(("option", "value"), [("degree", 3), ("leaf", 0), ("tail", 0)])
def test_wrong_options_are_named(keys, option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least"):
        build_index("graph", keys, None, **{option: value})


def test_seeds_are_searched(scene, index, truth):
    wanted = truth.ids[..., :10]
    without = index.search(scene.later, k=10, effort=10)
    seeded = index.search(scene.later, k=10, effort=10, seeds=wanted)
    assert recall(seeded.ids, wanted) == 1.0
    assert recall(without.ids, wanted) < 0.99
    padded = np.full((4, 32, 5), -1)
    padded[..., 0] = 10**6
    np.testing.assert_array_equal(
        index.search(scene.later, k=10, seeds=padded).ids, index.search(scene.later, k=10).ids
    )


@pytest.mark.parametrize("seeds", [np.zeros((4, 3), np.float32), np.zeros((3, 3), int), np.zeros(4, int)])
def test_wrong_seeds_are_named(scene, index, seeds):
    with pytest.raises(ValueError, match="seeds must be integers"):
        index.search(scene.later[:, 0], seeds=seeds)


def test_appended_keys_are_found_at_once_and_after_linking(scene, keys):
    index = build_index("graph", keys[:, :6000], scene.queries[:, :300], tail=256)
    for at in range(6000, 8192, 137):
        index.append(keys[:, at : at + 137])
        n = index.n_keys
        # The best new key of each head, asked for by itself.
        stored = (keys[:, at:n].astype(np.uint32) << 16).view(np.float32)
        q = np.repeat(stored[:, -1] - scene.keys.mean(axis=1), 2, axis=0) * 10
        exact = build_index("exact", keys[:, :n]).search(q, k=1)
        np.testing.assert_array_equal(index.search(q, k=1, effort=200).ids, exact.ids)
    assert index._state.n_linked > 7900
    check_connected(index)


def test_recall_does_not_decay_as_thousands_are_appended(scene, keys, truth):
    buffer = keys.copy()
    index = build_index("graph", buffer[:, :4096], scene.queries[:, : 512 * 3 // 7], tail=256)
    for at in range(4096, 8192, 64):
        index.append(buffer[:, at : at + 64], keys=buffer[:, : at + 64])
    assert recall(index.search(scene.later, k=100).ids, truth.ids) > 0.9
    check_connected(index)


def test_linking_cuts_no_key_off():
    """Few links and many newcomers in one place."""
    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.standard_normal((1, 500, 16)), rng.standard_normal((1, 2000, 16)) * 0.2], axis=1)
    keys = keys.astype(np.float32)
    index = build_index("graph", keys[:, :500], rng.standard_normal((1, 50, 16), dtype=np.float32), degree=4, tail=100)
    for at in range(500, 2500, 250):
        index.append(keys[:, at : at + 250])
        check_connected(index)
    assert index._state.n_linked == 2500


def test_what_stays_after_truncation_is_connected(scene, keys):
    index = build_index("graph", keys[:, :4000], scene.queries, tail=200)
    index.append(keys[:, 4000:4500])
    for n_keys in (4200, 4000, 1000, 3):
        index.truncate(n_keys)
        assert index._state.n_linked == n_keys
        check_connected(index)
        assert index._state.links.shape[1] == n_keys
        best = build_index("exact", keys[:, :n_keys]).search(scene.later, k=1)
        assert (index.search(scene.later, k=1, effort=20).ids == best.ids).mean() > 0.97
    index.append(keys[:, 3:900])
    check_connected(index)


def test_a_linked_tail_survives_saving(scene, keys, tmp_path):
    index = build_index("graph", keys[:, :4000], scene.queries, tail=200)
    for at in (4000, 4150, 4300):
        index.append(keys[:, at : at + 150])
    assert 4000 < index._state.n_linked < index.n_keys
    index.save(tmp_path / "a")
    for a, b in zip(index.search(scene.later), load_index(tmp_path / "a").search(scene.later), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes_are_told(index):
    assert index.nbytes >= 2 * 8192 * 12 * 4
    assert index.nbytes < 2 * 8192 * 128
