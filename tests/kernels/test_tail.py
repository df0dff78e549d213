import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from tail_layers import layer, relative

from retrieval_attn.kernels import AttentionState, TailSummary, merge
from retrieval_attn.kernels.merge import attend
from retrieval_attn.kernels.tail import PAGE, log_ndtr


def split_at_best(query, keys, values, scale, k):
    """Attention over the best k keys of each head, over the rest, their scores' limit: the truth to be estimated."""
    R = query.shape[1] // len(keys)
    keys, values = (x.double().repeat_interleave(R, 0)[None] for x in (keys, values))
    scores = query.double() @ keys.mT * scale
    limit = scores.topk(k, -1).values[..., -1:]
    best = attend(scores.masked_fill(scores < limit, -torch.inf), values)
    rest = attend(scores.masked_fill(scores >= limit, -torch.inf), values)
    return best, rest, limit[0, ..., 0].float()


@pytest.mark.parametrize("k", [8, 128, 1000])
def test_the_rest_is_estimated_within_a_few_per_cent_of_its_mass(k):
    query, keys, values, scale = layer()
    best, rest, limit = split_at_best(query, keys, values, scale, k)
    state = TailSummary(keys, values).attend_rest(query, limit, torch.full(limit.shape, k), scale)
    assert (state.lse - rest.lse).abs().max() < 0.1
    best, rest = (AttentionState(x.out.float(), x.lse.float()) for x in (best, rest))
    ours, alone, exact = merge(best, state).out, best.out, merge(best, rest).out
    assert relative(ours, exact) < 0.5 * relative(alone, exact)


def test_one_enormous_key_does_not_spoil_the_estimate():
    """It made the scores of all others look spread out, and the estimate worse than none."""
    query, keys, values, scale = layer(S=8192)
    keys[:, 4000] *= 100
    _, rest, limit = split_at_best(query, keys, values, scale, 64)
    state = TailSummary(keys, values).attend_rest(query, limit, torch.full(limit.shape, 64), scale)
    # The page of that key has an odd mean; the others do not know of it.
    assert (state.lse - rest.lse).abs().median() < 0.1


def test_nothing_found_means_all_is_estimated():
    query, keys, values, scale = layer(sharp=0.5)
    _, rest, _ = split_at_best(query, keys, values, scale, 1)
    none = torch.full((4, 3), torch.inf), torch.zeros((4, 3), dtype=torch.long)
    state = TailSummary(keys, values).attend_rest(query, *none, scale)
    assert (state.lse.double() - rest.lse).abs().max() < 0.1


def test_everything_found_leaves_the_empty_state():
    query, keys, values, scale = layer(S=300)
    limit = torch.zeros((4, 3))
    state = TailSummary(keys, values).attend_rest(query, limit, torch.full((4, 3), 300), scale)
    assert (state.lse == -torch.inf).all()
    assert not state.out.any()


@pytest.mark.parametrize("keys", [torch.zeros(1, 1000, 16), torch.ones(1, 1000, 16)])
def test_keys_that_are_all_alike_weigh_as_many_as_they_are(keys):
    values = torch.randn(1, 1000, 16)
    query = torch.randn(1, 2, 1, 16)
    limit = (query @ keys[0, 0] * 0.25)[0]
    state = TailSummary(keys, values).attend_rest(query, limit, torch.full((2, 1), 100), 0.25)
    expected = limit + math.log(900)
    assert torch.allclose(state.lse[0], expected, atol=2e-3)
    assert torch.allclose(state.out, values.mean(1).expand(2, 16)[None, :, None], atol=1e-3)


@given(cuts=st.lists(st.integers(1, 700), max_size=4), back=st.integers(0, 600))
@examples(30)
def test_follows_appends_and_truncation(cuts, back):
    _, keys, values, _ = layer(S=600 + sum(cuts), G=1, D=8)
    whole, n = TailSummary(keys[:, :600], values[:, :600]), 600
    for cut in cuts:
        whole.append(keys[:, n : n + cut], values[:, n : n + cut])
        n += cut
    left = max(1, n - back)
    whole.truncate(left, keys, values)
    assert whole.length == left
    means = whole.state()["tail_means"]
    both = torch.cat([keys, values], -1)[:, :left]
    expected = torch.stack([page.mean(1) for page in both.split(PAGE, dim=1)], 1)
    assert torch.allclose(means, expected, atol=1e-5)


def test_restored_it_estimates_the_same():
    query, keys, values, scale = layer(S=1000)
    limit, found = torch.zeros((4, 3)), torch.full((4, 3), 10)
    summary = TailSummary(keys[:, :900], values[:, :900])
    summary.append(keys[:, 900:], values[:, 900:])
    again = TailSummary.restore({name: x.clone() for name, x in summary.state().items()})
    for ours, theirs in zip(*(x.attend_rest(query, limit, found, scale) for x in (summary, again)), strict=True):
        assert torch.equal(ours, theirs)


def test_int8_is_read_as_plain_numbers():
    query, keys, values, scale = layer(S=1500)
    keys, values = ((x / x.abs().max() * 127).round().to(torch.int8) for x in (keys, values))
    limit, found = torch.full((4, 3), 3.0), torch.full((4, 3), 10)
    states = []
    for k, v in ((keys, values), (keys.float(), values.float())):
        summary = TailSummary(k[:, :1200], v[:, :1200])
        summary.append(k[:, 1200:], v[:, 1200:])
        summary.truncate(1300, k, v)
        states.append(summary.attend_rest(query, limit, found, scale / 20))
    assert torch.isfinite(states[0].lse).all()
    assert torch.equal(states[0].out, states[1].out)
    assert torch.equal(states[0].lse, states[1].lse)


def test_long_contexts_take_longer_pages():
    keys = torch.zeros(1, 256 * PAGE + 1, 2)
    assert TailSummary(keys, keys).page == 2 * PAGE


@pytest.mark.parametrize("x", [-1e5, -40.0, -8.0, -6.0, -5.9, -1.0, 0.0, 3.0, 50.0])
def test_log_ndtr(x):
    assert log_ndtr(x) == pytest.approx(
        float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64))), rel=2e-5, abs=1e-12
    )
