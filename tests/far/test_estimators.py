import numpy as np
import pytest
import torch
from tail_layers import layer, relative

from retrieval_attn.far.estimators import estimate_attention, within_mass, worst_scores
from retrieval_attn.index import build_index
from retrieval_attn.kernels import AttentionState, TailSummary, attend_near
from retrieval_attn.kernels.merge import attend


def found_in(query, keys, k, lift=None, seed=0):
    index = build_index("exact", keys, lift=lift, seed=seed)
    return index, index.search(query[0], k)


def exact(query, keys, values, scale):
    return attend_near(query.double(), keys[None].double(), values[None].double(), scale)


def estimated(query, keys, values, scale, estimator, k, seed=0, **options):
    index, hits = found_in(query, keys, k + (estimator == "lift"), scale if estimator == "lift" else None, seed)
    tail = TailSummary(keys, values) if estimator == "tail" else None
    return estimate_attention(
        query, keys, values, hits, scale, estimator=estimator, tail=tail, lift=index.lift, **options
    )


@pytest.mark.parametrize("share_group", [True, False])
@pytest.mark.parametrize("estimator", ["topk", "tail", "lift"])
def test_all_keys_found_is_full_attention(estimator, share_group):
    query, keys, values, scale = layer(S=700)
    far = estimated(query, keys, values, scale, estimator, 700 - (estimator == "lift"), share_group=share_group)
    true = exact(query, keys, values, scale)
    assert relative(far.state.out, true.out) < 1e-5
    assert (far.state.lse - true.lse).abs().max() < 1e-5
    assert (far.recovered > 0.99999).all()


@pytest.mark.parametrize(("estimator", "ratio"), [("tail", 0.3), ("lift", 0.7)])
def test_at_128_keys_read_the_error_is_well_below_that_of_topk(estimator, ratio):
    errors = {"topk": 0.0, estimator: 0.0}
    for seed in range(4):
        query, keys, values, scale = layer(seed=seed)
        true = exact(query, keys, values, scale)
        for name in errors:
            far = estimated(query, keys, values, scale, name, 128, seed=seed, share_group=False)
            errors[name] += relative(far.state.out, true.out)
    assert errors[estimator] <= ratio * errors["topk"]


def test_a_sample_is_unbiased_in_numerator_and_denominator():
    """The ratio is only consistent; its parts are right on average, which plain top-k's are not."""
    query, keys, values, scale = layer(S=2000, G=1, R=1, T=1, sharp=1.5)
    true = exact(query, keys, values, scale)
    total, weighted, n = 0.0, 0.0, 300
    for seed in range(n):
        state = estimated(query, keys, values, scale, "lift", 64, seed=seed).state
        mass = torch.exp(state.lse.double() - true.lse)
        total, weighted = total + mass / n, weighted + mass[..., None] * state.out.double() / n
    # One draw is off by about 1 / sqrt(63), 300 of them together by 0.007.
    assert abs(float(total) - 1) < 0.025
    assert relative(weighted, true.out) < 0.1
    biased = estimated(query, keys, values, scale, "topk", 64).state
    assert float(torch.exp(biased.lse.double() - true.lse)) < 0.8


def test_a_sampled_key_weighs_what_the_best_key_left_out_does_or_its_own_weight_if_that_is_more():
    """By definition: the last key found, of largest priority among the others, sets the threshold and is not read."""
    query, keys, values, scale = layer(S=700)
    index, hits = found_in(query, keys, 33, scale)
    state = estimate_attention(query, keys, values, hits, scale, estimator="lift", lift=index.lift).state
    R = query.shape[1] // len(keys)
    for h, t in np.ndindex(*hits.ids.shape[:2]):
        ids = torch.from_numpy(hits.ids[h, t, :-1]).long()
        scores = keys[h // R, ids].double() @ query[0, h, t].double() * scale
        raised = scores.clamp_min(float(hits.scores[h, t, -1]) * scale)
        assert (raised > scores).any()
        assert float(state.lse[0, h, t]) == pytest.approx(float(raised.logsumexp(0)), abs=1e-4)
        assert relative(state.out[0, h, t], raised.softmax(0) @ values[h // R, ids].double()) < 1e-4


@pytest.mark.parametrize("estimator", ["tail", "lift"])
def test_the_recovered_share_is_what_was_read(estimator):
    query, keys, values, scale = layer()
    far = estimated(query, keys, values, scale, estimator, 200, share_group=False)
    true = exact(query, keys, values, scale)
    _, hits = found_in(query, keys, 200, None)
    if estimator == "lift":
        _, hits = found_in(query, keys, 201, scale)
        hits = hits._replace(ids=hits.ids[..., :-1], scores=hits.scores[..., :-1])
    read = estimate_attention(query, keys, values, hits, scale, share_group=False).state
    share = torch.exp(read.lse.double() - true.lse)[0]
    # A sample knows the whole only to about 1 / sqrt(200).
    assert (far.recovered - share).abs().max() < (0.05 if estimator == "tail" else 0.1)
    assert (far.n_used == 200).all()


def test_tail_uses_what_the_other_heads_of_the_group_found_only_if_it_is_good_enough():
    query, keys, values, scale = layer(R=4)
    alone, shared = (estimated(query, keys, values, scale, "tail", 64, share_group=share) for share in (False, True))
    # The search was exact, so no other head can have found what this one should have.
    assert relative(shared.state.out, alone.state.out) < 1e-5


def test_the_worst_key_found_is_not_cut_off():
    query, keys, values, scale = layer(S=500, sharp=8.0)
    _, hits = found_in(query, keys, 1)
    n_found = np.sum(hits.ids >= 0, -1)
    far = estimate_attention(query, keys, values, hits, scale, estimator="tail", tail=TailSummary(keys, values))
    assert (far.recovered > 0.01).all()
    nothing = hits._replace(ids=np.full_like(hits.ids, -1), scores=np.full_like(hits.scores, -np.inf))
    assert (worst_scores(hits, scale, n_found) <= hits.scores[..., 0] * scale).all()
    assert (worst_scores(nothing, scale, 0 * n_found) == np.inf).all()


class TestWithinMass:
    def hits(self, scores):
        scores = np.asarray(scores, np.float32)[None, None]
        ids = np.where(np.isfinite(scores), np.arange(scores.shape[-1], dtype=np.int32), np.int32(-1))
        _, found = found_in(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4), 1)
        return found._replace(ids=ids, scores=scores)

    def kept(self, scores, mass, near=-np.inf, rest=-np.inf, least=1):
        state = lambda lse: AttentionState(torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), float(lse)))  # noqa: E731
        kept, enough = within_mass(self.hits(scores), 1.0, state(rest), (state(-np.inf), state(near)), mass, least)
        assert (np.isfinite(kept.scores) == (kept.ids >= 0)).all()
        return int(np.sum(kept.ids >= 0)), enough

    def test_keeps_the_fewest_that_suffice(self):
        scores = np.log([8, 4, 2, 1, 1])
        assert self.kept(scores, 0.5) == (1, True)
        assert self.kept(scores, 0.74) == (2, True)
        assert self.kept(scores, 0.76) == (3, True)

    def test_counts_the_window_and_the_rest(self):
        scores = np.log([8, 4, 2, 1, 1])
        assert self.kept(scores, 0.74, near=np.log(16)) == (1, True)
        assert self.kept(scores, 0.74, rest=np.log(16)) == (5, False)
        assert self.kept(scores, 0.4, rest=np.log(16)) == (3, True)

    def test_keeps_the_floor_and_skips_what_was_not_found(self):
        assert self.kept(np.log([8, 4, 2, 1]), 0.1, least=3) == (3, True)
        assert self.kept([1.0, 0.5, -np.inf, -np.inf], 0.999, least=3) == (2, True)


def test_attend_of_the_definition_agrees():
    query, keys, values, scale = layer(S=50, G=1, R=1, T=1)
    scores = query.double() @ keys[None].double().mT * scale
    assert relative(attend(scores, values[None].double()).out, exact(query, keys, values, scale).out) < 1e-10
