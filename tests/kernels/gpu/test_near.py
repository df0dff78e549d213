"""The kernel runs in Triton's interpreter, in float16 and float32, and is compiled for cards that are not here."""

import itertools
import logging

import pytest
import torch
from laws import some_of
from peaky import assert_as_exact_as_its_dtype, peaky
from triton_compile import Build, assert_fits, compile_case

from retrieval_attn.kernels import AttentionState, near
from retrieval_attn.kernels.gpu import near as gpu_near
from retrieval_attn.kernels.gpu.near import settings
from retrieval_attn.kernels.sparse.lists import HEAD_DIMS


def attend_near(*inputs):
    """The state that the kernel makes."""
    return AttentionState(*gpu_near.attend_near(*inputs))


DTYPES = [torch.float32, torch.float16]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 63, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_lengths(dtype, W, masked):
    inputs = peaky(R=4, S=W, dtype=dtype)
    mask = torch.rand(1, 8, 1, W) > 0.3 if masked else None
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dimensions(dtype, D):
    inputs = peaky(G=1, D=D, S=150, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "T"), [(1, 1), (3, 5), (7, 3), (2, 17)])
def test_rows_of_a_group_fill_tiles_in_any_way(dtype, R, T):
    inputs = peaky(R=R, T=T, S=70, B=2, dtype=dtype)
    mask = torch.rand(2, 2 * R, T, 70) > 0.3
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


@pytest.mark.parametrize("shape", [(63,), (5, 63), (1, 1, 5, 63), (2, 1, 1, 63), (1, 4, 5, 1), ()])
def test_masks_of_fewer_axes(shape):
    inputs = peaky(T=5, B=2)
    mask = torch.rand(shape) > 0.3
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_empty(dtype):
    inputs = peaky(T=5, S=300, dtype=dtype)
    mask = torch.ones(1, 4, 5, 300, dtype=torch.bool)
    mask[:, 1, 2] = False
    # Nothing in the first tiles, and nothing in the last.
    mask[:, 2, :, :250] = False
    mask[:, 3, :, 20:] = False
    state = attend_near(*inputs, mask)
    assert state.lse[0, 1, 2] == -torch.inf
    assert not state.out[0, 1, 2].any()
    assert_as_exact_as_its_dtype(state, *inputs, mask)


def test_all_heads_of_a_group_see_their_own_mask():
    """A needle that only one head of the group may see."""
    query, keys, values, scale = peaky(G=1, R=4, S=40)
    keys[:, :, 17] = 4 * query[:, 2:3, 0]
    mask = torch.ones(1, 4, 1, 40, dtype=torch.bool)
    mask[:, [0, 1, 3], :, 17] = False
    state = attend_near(query, keys, values, scale, mask)
    torch.testing.assert_close(state.out[0, 2, 0], values[0, 0, 17])
    assert_as_exact_as_its_dtype(state, query, keys, values, scale, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    query, keys, values, scale = peaky(T=3, S=50, B=2, dtype=dtype)
    inputs = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([keys, keys], -1)[..., :64],
        values.mT.contiguous().mT,
        scale,
    )
    mask = (torch.rand(50, 3) > 0.3).mT
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


def test_scores_far_from_zero():
    query, keys, values, scale = peaky(S=300)
    inputs = (query * 100, keys, values, scale)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


def test_says_once_what_has_no_kernel(monkeypatch, caplog):
    monkeypatch.setattr(near, "has_triton", lambda device: True)
    near._has_kernel.cache_clear()
    device = torch.device("cuda")
    with caplog.at_level(logging.WARNING, "retrieval_attn"):
        for dtype, D in itertools.product(NAMES, HEAD_DIMS):
            assert near._has_kernel(device, (dtype,) * 3, (D, D))
        assert not caplog.records
        for _ in range(2):
            assert not near._has_kernel(device, (torch.float16,) * 3, (80, 80))
        assert [r.getMessage() for r in caplog.records] == [
            "attention near runs without its kernel, which is slower: that wants one dtype, float16, bfloat16 or "
            "float32, and one dimension of 64, 96, 128, 256, got torch.float16, torch.float16, torch.float16 of "
            "dimension 80 and 80"
        ]
        assert not near._has_kernel(device, (torch.float16, torch.bfloat16, torch.bfloat16), (64, 64))
        assert not near._has_kernel(device, (torch.float16,) * 3, (128, 64))
    near._has_kernel.cache_clear()


def test_only_few_rows_and_some_keys_are_for_the_kernel(monkeypatch):
    monkeypatch.setattr(near, "_has_kernel", lambda *_: True)
    for R, T, W, fits in ((8, 16, 5, True), (8, 17, 5, False), (4, 0, 5, False), (4, 1, 0, False)):
        query, keys = torch.zeros(1, 2 * R, T, 64), torch.zeros(1, 2, W, 64)
        assert near._is_one_launch(query, keys, keys) is fits


def build(D, dtype, cc, masked):
    constants, options = settings(D, dtype, masked)
    pointer = f"*{NAMES[dtype]}:16"
    types = dict.fromkeys(("query", "keys", "values", "out"), pointer)
    types |= {"mask": "*i1" if masked else pointer, "lse": "*fp32:16", "scale": "fp32"}
    types |= dict.fromkeys(("query_b", "query_h", "query_t"), "i32:16")
    types |= dict.fromkeys(("keys_b", "keys_g", "keys_w", "values_b", "values_g", "values_w"), "i32:16")
    types |= dict.fromkeys(("mask_b", "mask_h", "mask_t", "mask_w", "G", "n_rows", "T", "W"), "i32")
    kernel = "retrieval_attn.kernels.gpu.near:_attend"
    return Build(kernel, cc, tuple(types.items()), tuple(constants.items()), tuple(options.items()))


CASES = some_of(HEAD_DIMS, tuple(NAMES), (80, 89, 90), (False, True), few=2)


@pytest.mark.parametrize(("D", "dtype", "cc", "masked"), CASES)
def test_compiles(D, dtype, cc, masked):
    assert_fits(compile_case(build, (D, dtype, cc, masked), CASES), cc)
