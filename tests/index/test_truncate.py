"""Going back: what was cut off is never found, what stays is found as before, and new keys take its place."""

import numpy as np
import pytest
from index_vectors import attention_like, recall

from retrieval_attn.index import INDEX_KINDS, build_index

K = 50


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=3000)


def true_ids(keys, queries):
    scores = np.einsum("htd,hsd->hts", queries, np.repeat(keys, len(queries) // len(keys), axis=0))
    return np.argsort(-scores, axis=2)[:, :, :K]


# Not ivf at 300: its clusters are those of ten times the keys, so the lists it probes are nearly empty.
@pytest.mark.parametrize(
    ("kind", "n_kept"), [(kind, n) for kind in INDEX_KINDS for n in (2990, 1800, 300) if (kind, n) != ("ivf", 300)]
)
def test_what_stays_is_found(kind, n_kept, scene):
    index = build_index(kind, scene.keys, scene.queries)
    index.truncate(n_kept)
    assert index.n_keys == n_kept
    hit = index.search(scene.later, K)
    assert hit.ids.max() < n_kept
    fresh = build_index(kind, scene.keys[:, :n_kept], scene.queries).search(scene.later, K)
    truth = true_ids(scene.keys[:, :n_kept], scene.later)
    assert recall(hit.ids, truth) >= recall(fresh.ids, truth) - 0.05


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_other_keys_can_follow(kind, scene):
    # Few enough for ivf to scan: its centroids know nothing of another text.
    other = attention_like(n_keys=3000, seed=1).keys[:, :900]
    index = build_index(kind, scene.keys, scene.queries)
    index.truncate(1800)
    changed = np.concatenate([scene.keys[:, :1800], other], axis=1)
    index.append(other, keys=changed)
    truth = true_ids(changed, scene.later)
    ours = recall(index.search(scene.later, K).ids, truth)
    assert ours >= recall(build_index(kind, changed, scene.queries).search(scene.later, K).ids, truth) - 0.1


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_appended_keys_can_go_again(kind, scene):
    index = build_index(kind, scene.keys[:, :2500], scene.queries)
    before = index.search(scene.later, K)
    index.append(scene.keys[:, 2500:])
    index.truncate(2500)
    after = index.search(scene.later, K)
    assert recall(after.ids, before.ids) > 0.95
    if kind != "graph":
        assert np.array_equal(after.ids, before.ids)


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("n_keys", [0, -1, 3001])
def test_mistakes_are_named(kind, n_keys, scene):
    index = build_index(kind, scene.keys, scene.queries)
    with pytest.raises(ValueError, match=f"n_keys must be between 1 and 3000.*, got {n_keys}"):
        index.truncate(n_keys)
