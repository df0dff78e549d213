import numpy as np
import pytest
from index_vectors import attention_like

from retrieval_attn.index import build_index, load_index
from retrieval_attn.index.lift import Lift, draw

KINDS = ["exact", "ivf"]


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=3000, n_later=4)


def true_priorities(scene, lift):
    """Scores plus bonus of every later query and key, (H, N, S)."""
    ratio = len(scene.later) // len(scene.keys)
    keys, bonus = (np.repeat(x, ratio, axis=0) for x in (scene.keys, lift.bonuses(3000)[:, :3000]))
    return scene.later @ keys.transpose(0, 2, 1) + bonus[:, None]


def test_numbers_are_exponential_and_depend_on_seed_head_and_key_alone():
    numbers = draw(3, 4, 50_000)
    assert numbers.dtype == np.float32
    assert (numbers >= 0).all()
    assert np.isfinite(numbers).all()
    assert abs(numbers.mean() - 1) < 0.02
    assert abs(np.quantile(numbers, 0.9) - np.log(10)) < 0.05
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(numbers[0, 1:], numbers[0, :-1])[0, 1]) < 0.02
    assert np.array_equal(draw(3, 2, 1000), numbers[:2, :1000])
    assert not np.array_equal(draw(4, 2, 1000), numbers[:2, :1000])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_scales_that_are_not_positive(scale):
    with pytest.raises(ValueError, match=r"lift must be positive \(the softmax scale"):
        Lift(scale, 0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_lifted_indexes_rank_by_priority(scene, kind):
    index = build_index(kind, scene.keys, scene.queries, lift=0.125, seed=5)
    expected = true_priorities(scene, index.lift)
    hits = index.search(scene.later, 50, effort=10_000)
    best = np.argsort(-expected, axis=-1)[..., :50]
    assert np.mean(hits.ids == best) > 0.99
    assert np.allclose(hits.scores, np.take_along_axis(expected, hits.ids, -1), rtol=1e-4, atol=1e-3)
    plain = build_index(kind, scene.keys, scene.queries, seed=5)
    assert plain.lift is None
    assert np.mean(hits.ids == plain.search(scene.later, 50, effort=10_000).ids) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_appended_and_restored_keys_keep_their_bonus(scene, kind, tmp_path):
    at_once = build_index(kind, scene.keys, scene.queries, lift=0.125, seed=5)
    grown = build_index(kind, scene.keys[:, :2500], scene.queries, lift=0.125, seed=5)
    for n in range(2500, 3000, 100):
        grown.append(scene.keys[:, n : n + 100])
    wanted = at_once.search(scene.later, 50, effort=10_000)
    assert np.array_equal(grown.search(scene.later, 50, effort=10_000).ids, wanted.ids)
    grown.truncate(2600)
    grown.append(scene.keys[:, 2600:])
    assert np.array_equal(grown.search(scene.later, 50, effort=10_000).ids, wanted.ids)
    grown.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert (loaded.lift.scale, loaded.lift.seed) == (0.125, 5)
    assert np.array_equal(loaded.search(scene.later, 50, effort=10_000).ids, wanted.ids)
