"""Going back: what was cut off is never found, what stays is found as before, and new keys take its place."""

import numpy as np
import pytest
from index_vectors import attention_like, recall
from laws import rarely, some_of

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
    ("kind", "n_kept"),
    [
        *((kind, 1800) for kind in INDEX_KINDS),
        *(("scan", 2990), ("graph", 300)),
        *rarely(*((kind, 2990) for kind in ("exact", "ivf", "graph", "page"))),
        *rarely(*((kind, 300) for kind in ("exact", "scan", "page"))),
    ],
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


@pytest.mark.parametrize(("kind", "n_keys"), some_of(INDEX_KINDS, [0, -1, 3001]))
def test_mistakes_are_named(kind, n_keys, scene):
    index = build_index(kind, scene.keys, scene.queries)
    with pytest.raises(ValueError, match=f"n_keys must be between 1 and 3000.*, got {n_keys}"):
        index.truncate(n_keys)


def test_scan_chooses_coordinates_anew_for_what_follows_a_cut():
    """Those that it had were chosen from keys most of which are gone; half as many new ones again are too many."""
    keys, other = (attention_like(n_keys=3000, seed=seed).keys for seed in (0, 1))
    index = build_index("scan", keys)
    index.truncate(1000)
    index.append(other[:, :499])
    first = build_index("scan", keys)
    assert np.array_equal(index._state.map.keys, first._state.map.keys)
    index.append(other[:, 499:500])
    fresh = build_index("scan", np.concatenate([keys[:, :1000], other[:, :500]], axis=1))
    assert np.array_equal(index._state.map.keys, fresh._state.map.keys)
    assert np.array_equal(index._state.codes.trimmed()[0], fresh._state.codes.trimmed()[0])
    # Coordinates stay as they are until half as many keys again have come.
    index.append(other[:, 500:1200])
    assert np.array_equal(index._state.map.keys, fresh._state.map.keys)


def test_ivf_clusters_anew_what_follows_a_cut():
    keys, other = (attention_like(n_keys=6000, seed=seed).keys for seed in (0, 1))
    index = build_index("ivf", keys)
    index.truncate(2000)
    index.append(other[:, :1000])
    fresh = build_index("ivf", np.concatenate([keys[:, :2000], other[:, :1000]], axis=1))
    assert np.array_equal(index._state.mean, fresh._state.mean)


@pytest.mark.parametrize("kind", ["scan", "page", "graph"])
def test_what_grows_after_a_cut_is_not_seen_by_who_saw_what_was_cut(kind, scene):
    """A snapshot reads the rows behind the cut; the index that was cut must write its new ones elsewhere."""
    index = build_index(kind, scene.keys[:, :2500], scene.queries, **({"tail": 64} if kind == "graph" else {}))
    index.append(scene.keys[:, 2500:])
    seen = index.snapshot()
    before = seen.search(scene.later, K)
    index.truncate(2400)
    index.append(np.ascontiguousarray(-scene.keys[:, 2400:]))
    after = seen.search(scene.later, K)
    for x, y in zip(before, after, strict=True):
        assert np.array_equal(x, y)
