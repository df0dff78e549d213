import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from peaky import peaky
from states import GAPS, SHAPE, assert_same, state, wide

from retrieval_attn.kernels import AttentionState, merge, reference
from retrieval_attn.kernels.merge import attend, share_of_scores, shares_read

lses = st.one_of(st.floats(-300, 300, width=32), st.sampled_from([-math.inf, 1e4, -1e4]))


@given(lses, lses)
@examples(60)
def test_commutes(x, y):
    a, b = state(x, 1), state(y, 2)
    assert_same(merge(a, b), merge(b, a))


@given(lses, lses, lses)
@examples(60)
def test_associates(x, y, z):
    a, b, c = state(x, 1), state(y, 2), state(z, 3)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(a, b, c), merge(a, merge(b, c)))


@given(lses, lses)
@examples(60)
def test_is_the_definition_in_float64(x, y):
    a, b = state(x, 1), state(y, 2)
    merged, defined = merge(a, b), reference.merge(wide(a), wide(b))
    assert_same(wide(merged), defined)
    assert merged.out.isfinite().all()


@given(lses)
@examples(30)
def test_empty_is_the_identity_to_the_bit(x):
    a, none = state(x, 1), AttentionState.empty(SHAPE)
    for merged in (merge(a, none), merge(none, a), merge(none, a, none)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


@pytest.mark.parametrize("gap", GAPS)
def test_survives_any_gap(gap):
    if math.isinf(gap):
        a, b = state(0.0 if gap > 0 else -math.inf, 1), state(-math.inf if gap > 0 else 0.0, 2)
    else:
        a, b = state(gap, 1), state(0.0, 2)
    merged = merge(a, b)
    assert merged.out.isfinite().all()
    assert not merged.lse.isnan().any()
    if abs(gap) >= 200:
        assert torch.equal(merged.out, (a if gap > 0 else b).out)


def test_some_rows_empty_on_one_side_only():
    a, b = state(1.0, 1), state(2.0, 2)
    a.out[:, 0], a.lse[:, 0] = 0, -math.inf
    b.out[:, 1], b.lse[:, 1] = 0, -math.inf
    merged = merge(a, b)
    assert torch.equal(merged.out[:, 0], b.out[:, 0])
    assert torch.equal(merged.out[:, 1], a.out[:, 1])
    assert_same(wide(merged), reference.merge(wide(a), wide(b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_out_keeps_the_first_dtype_and_is_rounded_once(dtype):
    states = [state(lse, seed, dtype) for seed, lse in enumerate((3.0, 3.5, 2.5, 3.2))]
    merged = merge(*states)
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    in_float32 = merge(*(AttentionState(s.out.float(), s.lse) for s in states))
    assert torch.equal(merged.out, in_float32.out.to(dtype))


def test_leaves_its_arguments_unchanged():
    a, b = state(1.0, 1), state(2.0, 2)
    before = [x.clone() for x in (*a, *b)]
    merge(a, b)
    assert all(torch.equal(x, y) for x, y in zip(before, (*a, *b), strict=True))


def test_halves_of_attention_make_the_whole():
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 90, 16) * 4, torch.randn(1, 2, 90, 16)
    thirds = (slice(0, 30), slice(30, 31), slice(31, 90))
    parts = [reference.attend_near(q, k[:, :, s], v[:, :, s], 0.7) for s in thirds]
    assert_same(merge(*parts), reference.attend_near(q, k, v, 0.7))


def some_scores(n, scale=5.0):
    return scale * torch.randn((4, 3, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def over(scores):
    """The state of keys with these scores (H, T, n)."""
    return attend(scores[None].float(), torch.ones(1, 4, scores.shape[-1], 8))


def test_shares_of_the_mass_are_sums_of_the_softmax():
    scores = some_scores(90)
    softmax = scores.softmax(-1)
    parts = (slice(0, 30), slice(30, 31), slice(31, 90))
    whole = merge(*(over(scores[..., part]) for part in parts))
    for part in parts:
        held = softmax[..., part].sum(-1)
        torch.testing.assert_close(over(scores[..., part]).share_of(whole)[0].double(), held, atol=1e-5, rtol=0)
        torch.testing.assert_close(share_of_scores(scores[..., part], whole).double(), held, atol=1e-5, rtol=0)


def test_no_keys_hold_nothing_and_a_share_that_is_nan_is_not_hidden():
    none, some = AttentionState.empty(SHAPE), state(250.0)
    assert (none.share_of(none) == 0).all()
    assert (none.share_of(some) == 0).all()
    assert (some.share_of(some) == 1).all()
    assert some.share_of(state(math.nan)).isnan().all()


def test_shares_read_count_what_is_read_anyway_and_the_rest():
    scores = some_scores(40)
    softmax = scores.softmax(-1)
    hits, window, newest, rest = scores.split([10, 5, 5, 20], dim=-1)
    shares = shares_read(hits, [over(window), over(newest)], over(rest))
    wanted = softmax[..., :10].cumsum(-1) + softmax[..., 10:20].sum(-1, keepdim=True)
    torch.testing.assert_close(shares, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_beside_is_one_behind_the_other(dim):
    a, b = state(1.0, 1), state(2.0, 2)
    both = AttentionState.beside([a, b], dim)
    n = SHAPE[dim]
    assert torch.equal(both.out.narrow(dim, 0, n), a.out)
    assert torch.equal(both.out.narrow(dim, n, n), b.out)
    assert torch.equal(both.lse, torch.cat([a.lse, b.lse], dim))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (state(0.0, shape=(1, 4, 2, 8)), r"must share a shape, got \(1, 4, 3, 8\) and \(1, 4, 2, 8\)"),
        (AttentionState(torch.zeros(SHAPE), torch.zeros(1, 4, 1)), "lse must have the shape of out"),
        (AttentionState(*(x.to("meta") for x in state())), "one device, got cpu and meta"),
    ],
)
def test_names_what_does_not_fit(other, message):
    with pytest.raises(ValueError, match=message):
        merge(state(), other)


def test_a_sink_is_one_more_key_without_a_value():
    query, keys, values, scale = peaky(S=20, T=3)
    sinks = torch.tensor([-torch.inf, 0.0, 5.0, 50.0])
    scores = query @ keys.repeat_interleave(2, 1).mT * scale
    weights = torch.cat([scores, sinks[None, :, None, None].expand(1, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    state = reference.attend_near(query, keys, values, scale).with_sinks(sinks)
    torch.testing.assert_close(state.out, weights @ values.repeat_interleave(2, 1))
    assert state.out[:, 3].abs().max() < 1e-6 < state.out[:, 0].abs().max()
    nothing = AttentionState.empty((1, 4, 3, 64)).with_sinks(sinks)
    assert not nothing.out.any()
