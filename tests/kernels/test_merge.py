import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from states import GAPS, SHAPE, assert_same, state, wide

from retrieval_attn.kernels import AttentionState, merge, reference

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
