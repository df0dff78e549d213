"""Benchmark vectors have the properties of real ones: see bench/vectors.py."""

import pytest
import torch

from retrieval_attn.bench.vectors import measure, shaped

S, H, G, D = 6000, 8, 2, 128


@pytest.fixture(scope="module")
def vectors():
    return shaped(S, H, G, D, n_prefill=200, n_heldout=40, seed=3)


def test_shapes_and_dtype():
    found = shaped(500, 4, 2, 32, n_prefill=30, n_heldout=7, seed=0, dtype=torch.bfloat16)
    assert [tuple(x.shape) for x in found] == [(2, 500, 32), (4, 30, 32), (4, 7, 32), (2, 500, 32)]
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("n_keys", [1, 63, 1000])
def test_short_contexts(n_keys):
    found = shaped(n_keys, 2, 1, 16, n_prefill=3, n_heldout=2, seed=0)
    assert found.keys.shape == (1, n_keys, 16)
    assert all(torch.isfinite(x).all() for x in found)


def test_the_seed_decides():
    a, b, c = (shaped(300, 4, 2, 32, 10, 5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.keys, c.keys)


def test_promised_properties(vectors):
    found = measure(vectors)
    assert 0.8 <= found["top_mass"] <= 0.96
    assert 5 <= found["distance_ratio"] <= 10
    assert found["effective_rank"] <= D / 2
    assert found["mean_share"] >= 0.2
    assert found["neighbour_cosine"] >= 0.3 > abs(found["random_cosine"]) + 0.2
    assert 0.05 <= found["group_overlap"] <= 0.6


def test_top_mass_is_calibrated_for_each_head(vectors):
    for h in range(H):
        one = vectors._replace(queries=vectors.queries[h : h + 1], keys=vectors.keys[h * G // H : h * G // H + 1])
        assert 0.7 <= measure(one)["top_mass"] <= 0.99


def test_held_out_queries_are_new_but_alike(vectors):
    asked, heldout = vectors.prefill_queries[0], vectors.queries[0]
    assert torch.cdist(heldout, asked).min() > 1e-3
    assert 0.8 < heldout.norm(dim=1).mean() / asked.norm(dim=1).mean() < 1.25


def test_neighbours_of_a_query_lie_apart(vectors):
    """A clustering of the keys must not find them: of the best 100, those of one passage of 256 are few."""
    best = (vectors.queries[0] @ vectors.keys[0].T).topk(100).indices
    passages = [len(set((row // 256).tolist())) for row in best]
    assert sum(passages) / len(passages) > S // 256 / 2


@pytest.mark.parametrize("shape", [(0, 4, 2, 32), (10, 3, 2, 32), (10, 4, 2, 24)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be"):
        shaped(*shape, n_prefill=1, n_heldout=1, seed=0)
