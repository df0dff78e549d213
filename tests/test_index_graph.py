"""The graph index on vectors that look like attention, on vectors that do not, and as it grows."""

import numpy as np
import pytest
from test_index_vectors import as_bfloat16, attention_like, recall

from retrieval_attn.index import build_index, load_index


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


def reached(index):
    """Per head, which linked keys a search that never stops would meet; a plain reading of the links."""
    links, hubs = index._state.links[:, : index._state.n_linked], index._hubs
    seen = np.zeros(links.shape[:2], bool)
    for head in range(len(links)):
        front = hubs[head][hubs[head] >= 0]
        while len(front):
            seen[head, front] = True
            after = np.unique(links[head, front])
            front = after[after >= 0]
            front = front[~seen[head, front]]
    return seen


def test_later_queries_find_their_keys(scene, index, truth):
    hit = index.search(scene.later, k=100)
    assert recall(hit.ids, truth.ids) > 0.97
    assert hit.visited.mean() < 0.25 * index.n_keys
    best = hit.ids[..., 0] == truth.ids[..., 0]
    assert best.mean() > 0.99


def test_needles_are_found(scene, keys):
    """One key per head that only a later query wants, far from all the prefill asked for."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((4, 64), dtype=np.float32) * 3
    planted = scene.keys.copy()
    for head in range(4):
        planted[head // 2, 1000 + head] = planted[head // 2].mean(axis=0) + q[head]
    index = build_index("graph", as_bfloat16(planted), scene.queries)
    assert (index.search(q, k=10).ids[:, 0] == 1000 + np.arange(4)).all()


def test_it_beats_what_it_visits_at_random_and_grows_with_effort(scene, index, truth):
    found = [recall(index.search(scene.later, k=100, effort=e).ids, truth.ids) for e in (100, 200, 400)]
    assert found == sorted(found)
    assert found[0] > 0.9
    assert found[-1] > 0.99


def test_queries_of_every_head_shape_the_graph(scene, keys, truth):
    """Built for one head of each group only, the other head's recall falls: so all heads' queries are used."""
    one_sided = scene.queries.copy()
    one_sided[1], one_sided[3] = one_sided[0], one_sided[2]
    found = build_index("graph", keys, one_sided).search(scene.later[[1, 3]].repeat(2, axis=0), k=100, effort=100)
    both = build_index("graph", keys, scene.queries).search(scene.later[[1, 3]].repeat(2, axis=0), k=100, effort=100)
    wanted = truth.ids[[1, 3]].repeat(2, axis=0)
    assert recall(both.ids, wanted) > recall(found.ids, wanted)


def test_without_queries_it_still_works(scene, keys, truth):
    index = build_index("graph", keys)
    assert recall(index.search(scene.later, k=100, effort=400).ids, truth.ids) > 0.9
    assert reached(index).all()


def test_every_key_is_reachable(index):
    assert reached(index).all()


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
    assert reached(index).all()
    q = rng.standard_normal((2, 20, 32), dtype=np.float32)
    # The beam must hold several runs of equal keys, or it sees only the first it meets.
    most_equal = np.unique(keys[0], axis=0, return_counts=True)[1].max()
    hit = index.search(q, k=50, effort=400 if most_equal < 50 else 1500)
    exact = build_index("exact", keys).search(q, k=50)
    # Among equal scores any id is right.
    assert (hit.scores >= exact.scores[..., -1:] - 1e-4 * np.abs(exact.scores[..., -1:])).mean() > 0.9
    assert all(len(set(row)) == 50 for row in hit.ids.reshape(-1, 50))


def test_seeds_are_searched(scene, index, truth):
    q = scene.later[:, 0]
    without = index.search(q, k=100, effort=100)
    seeded = index.search(q, k=100, effort=100, seeds=truth.ids[:, 0])
    assert recall(seeded.ids, truth.ids[:, 0]) == 1.0
    assert recall(without.ids, truth.ids[:, 0]) < 1.0
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
    assert reached(index).all()


def test_recall_does_not_decay_as_thousands_are_appended(scene, keys, truth):
    buffer = keys.copy()
    index = build_index("graph", buffer[:, :4096], scene.queries[:, : 512 * 3 // 7], tail=256)
    for at in range(4096, 8192, 64):
        index.append(buffer[:, at : at + 64], keys=buffer[:, : at + 64])
    assert recall(index.search(scene.later, k=100).ids, truth.ids) > 0.9
    assert reached(index).all()


def test_linking_cuts_no_key_off():
    """Few links and many newcomers among equal keys: hosts give up their longest link again and again."""
    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.standard_normal((1, 500, 16)), rng.standard_normal((1, 2000, 16)) * 0.2], axis=1)
    keys = keys.astype(np.float32)
    index = build_index("graph", keys[:, :500], rng.standard_normal((1, 50, 16), dtype=np.float32), degree=4, tail=100)
    for at in range(500, 2500, 250):
        index.append(keys[:, at : at + 250])
        assert reached(index).all()
    assert index._state.n_linked == 2500


def test_a_linked_tail_survives_saving(scene, keys, tmp_path):
    index = build_index("graph", keys[:, :4000], scene.queries, tail=200)
    for at in (4000, 4150, 4300):
        index.append(keys[:, at : at + 150])
    assert 4000 < index._state.n_linked < index.n_keys
    index.save(tmp_path / "a")
    for a, b in zip(index.search(scene.later), load_index(tmp_path / "a").search(scene.later), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes_are_told(index):
    assert index.nbytes >= 2 * 8192 * 32 * 4
    assert index.nbytes < 1.2 * 2 * 8192 * 32 * 4
