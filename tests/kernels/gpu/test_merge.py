"""The kernel runs in Triton's interpreter, in float16 and float32, and is compiled for cards that are not here."""

import logging
import math

import pytest
import torch
from laws import some_of
from states import GAPS, assert_same, state, wide
from triton_compile import Build, assert_fits, compile_case

from retrieval_attn.kernels import AttentionState, reference
from retrieval_attn.kernels.gpu.merge import merge_pair, settings
from retrieval_attn.kernels.merge import has_triton

# NumPy warns of infinities, which here are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DIMS = [8, 64, 80, 96, 128, 256]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def merged(a, b, dtype=None):
    return AttentionState(*merge_pair(*a, *b, dtype or a.out.dtype))


def random_lse(a, spread=3.0):
    return AttentionState(a.out, spread * torch.randn(a.lse.shape))


@pytest.mark.parametrize("gap", GAPS)
def test_survives_any_gap(gap):
    if math.isinf(gap):
        a, b = state(0.0 if gap > 0 else -math.inf, 1), state(-math.inf if gap > 0 else 0.0, 2)
    else:
        a, b = state(gap, 1), state(0.0, 2)
    both = merged(a, b)
    assert_same(wide(both), reference.merge(wide(a), wide(b)))
    assert both.out.isfinite().all()
    if abs(gap) >= 200:
        assert torch.equal(both.out, (a if gap > 0 else b).out)


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("T", [1, 5, 63])
def test_is_the_definition_in_float64(D, T):
    a, b = (random_lse(state(0.0, seed, shape=(2, 3, T, D))) for seed in (1, 2))
    both = merged(a, b)
    assert both.out.shape == a.out.shape
    assert both.lse.shape == a.lse.shape
    assert_same(wide(both), reference.merge(wide(a), wide(b)))
    assert_same(both, merged(b, a))


def test_rows_empty_on_either_side_and_on_both():
    a, b = random_lse(state(0.0, 1)), random_lse(state(0.0, 2))
    for side, heads in ((a, [0, 2]), (b, [1, 2])):
        side.out[:, heads], side.lse[:, heads] = 0, -math.inf
    both = merged(a, b)
    assert torch.equal(both.out[:, 0], b.out[:, 0])
    assert torch.equal(both.lse[:, 0], b.lse[:, 0])
    assert torch.equal(both.out[:, 1], a.out[:, 1])
    assert torch.equal(both.lse[:, 1], a.lse[:, 1])
    assert not both.out[:, 2].any()
    assert (both.lse[:, 2] == -math.inf).all()
    assert_same(wide(both), reference.merge(wide(a), wide(b)))


@pytest.mark.parametrize("first", [torch.float16, torch.float32])
@pytest.mark.parametrize("other", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_is_computed_in_float32_and_rounded_once(first, other, dtype):
    a, b = random_lse(state(0.0, 1, first)), random_lse(state(0.0, 2, other))
    both = merged(a, b, dtype)
    in_float32 = merged(AttentionState(a.out.float(), a.lse), AttentionState(b.out.float(), b.lse))
    assert both.out.dtype == dtype
    assert torch.equal(both.out, in_float32.out.to(dtype))
    assert torch.equal(both.lse, in_float32.lse)


def test_strided_inputs_unchanged():
    a = random_lse(state(0.0, 1))
    b = AttentionState(torch.randn(1, 3, 4, 8).transpose(1, 2), torch.randn(1, 3, 4).transpose(1, 2))
    before = [x.clone() for x in (*a, *b)]
    assert_same(wide(merged(a, b)), reference.merge(wide(a), wide(b)))
    assert all(torch.equal(x, y) for x, y in zip(before, (*a, *b), strict=True))


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_says_once_where_triton_does_not_run(monkeypatch, caplog, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "this card")
    has_triton.cache_clear()
    with caplog.at_level(logging.WARNING, "retrieval_attn"):
        assert {has_triton(torch.device("cuda")) for _ in range(2)} == {runs}
    assert len(caplog.records) == (not runs)
    if not runs:
        assert "capability 8.0, which this card has not" in caplog.text
    has_triton.cache_clear()


def build(D, dtypes, cc):
    first, other, dtype = dtypes
    constants, options = settings(D)
    types = {"a_out": f"*{NAMES[first]}:16", "b_out": f"*{NAMES[other]}:16", "out": f"*{NAMES[dtype]}:16"}
    types |= dict.fromkeys(("a_lse", "b_lse", "lse"), "*fp32:16") | {"n_rows": "i32", "D": "i32"}
    kernel = "retrieval_attn.kernels.gpu.merge:_merge"
    return Build(kernel, cc, tuple(types.items()), tuple(constants.items()), tuple(options.items()))


# All of one dtype, and the first two of three.
DTYPES = [(dtype, dtype, dtype) for dtype in NAMES] + [(torch.bfloat16, torch.bfloat16, torch.float32)]
CASES = some_of((64, 96, 128, 256), DTYPES, (80, 89, 90), few=2)


@pytest.mark.parametrize(("D", "dtypes", "cc"), CASES)
def test_compiles(D, dtypes, cc):
    assert_fits(compile_case(build, (D, dtypes, cc), CASES), cc)
