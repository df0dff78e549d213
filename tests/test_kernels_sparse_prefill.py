import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_near import DTYPES, float32_rounding, peaky

from retrieval_attn.kernels import HeadPattern, attend_adaptive, attend_dense, attend_patterns, reference

EVERYTHING = {
    kind: HeadPattern(kind, 1 << 20, 1 << 20) for kind in ("a_shape", "vertical_slash", "block_sparse", "dense")
}


def assert_dense(state, query, keys, values, scale):
    """What dense attention in the same dtype gives, within twice its own error."""
    true = reference.attend_dense(query.double(), keys.double(), values.double(), scale, causal=True)
    plain = attend_dense(query, keys, values, scale, causal=True)
    for ours, own, exact in zip(state, plain, true, strict=True):
        allowed = 2 * (own.double() - exact).abs().max() + float32_rounding(true)
        assert (ours.double() - exact).abs().max() <= allowed


@given(
    T=st.integers(1, 200), past=st.integers(0, 200), R=st.sampled_from([1, 2, 4]),
    kinds=st.lists(st.sampled_from(sorted(EVERYTHING)), min_size=8, max_size=8),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_patterns_that_read_everything_are_dense_whatever_each_head_has(T, past, R, kinds):
    inputs = peaky(G=2, R=R, T=T, S=T + past, B=2, D=16)
    assert_dense(attend_patterns(*inputs, [EVERYTHING[kind] for kind in kinds[: 2 * R]]), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    inputs = peaky(G=2, R=2, T=100, S=230, dtype=dtype)
    state = attend_patterns(*inputs, list(EVERYTHING.values()))
    assert state.out.dtype == dtype
    assert_dense(state, *inputs)


def test_a_needle_off_the_pattern_is_missed_and_found_by_the_heads_that_look_there():
    query, keys, values, scale = peaky(G=1, R=3, T=128, S=640)
    query[:] = query[:, :, :1]
    keys[0, 0, 200] = 6 * query[0, 0, 0]
    query[:] = query[:, :1]
    patterns = [HeadPattern("a_shape", 64, 64), HeadPattern("vertical_slash", 40, 100), HeadPattern("dense")]
    out = attend_patterns(query, keys, values, scale, patterns).out[0]
    near = torch.isclose(out, values[0, 0, 200].expand_as(out), atol=1e-2).all(-1)
    assert not near[0].any()
    assert near[1].all()
    assert near[2].all()


@given(T=st.integers(1, 300), past=st.integers(0, 300), R=st.sampled_from([1, 2]), B=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_flat_attention_is_left_dense(T, past, R, B):
    """Random inputs have nothing to leave out: sparse attention would be wrong."""
    query, keys, values, scale = peaky(G=2, R=R, T=T, S=T + past, B=B, D=16)
    state, choices = attend_adaptive(0.01 * query, keys, values, scale, 0.98)
    assert len(choices) == 2 * R * B
    assert_dense(state, 0.01 * query, keys, values, scale)


@pytest.mark.parametrize("past", [0, 700])
def test_local_heads_are_sparse_and_as_good_as_asked(past):
    T = 1024
    query, keys, values, scale = peaky(G=2, R=2, T=T, S=T + past, B=2, D=32)
    for x, offset in ((query, past), (keys, 0)):
        phase = 0.003 * (offset + torch.arange(x.shape[2]))
        x[:, 1::2] *= 0.01
        x[:, 1::2, :, 0], x[:, 1::2, :, 1] = 90 * phase.cos(), 90 * phase.sin()
    query[:, 2:] *= 0.01
    state, choices = attend_adaptive(query, keys, values, scale, 0.98)
    exact = attend_dense(query, keys, values, scale, causal=True)
    error = (state.out - exact.out).norm(dim=(2, 3)) / exact.out.norm(dim=(2, 3))
    assert (error < 0.04).all()
    assert sum(choice.kind == "dense" for choice in choices) <= 6


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_is_not_hidden(where):
    """Whoever gives NaN gets NaN, as from dense attention, and never a number made of it."""
    query, keys, values, scale = peaky(G=1, R=2, T=300, S=900, D=16)
    {"query": query, "key": keys, "value": values}[where][0, 0, 299 if where == "query" else 5] = torch.nan
    for state in (
        attend_adaptive(query, keys, values, scale, 0.9)[0],
        attend_patterns(query, keys, values, scale, [EVERYTHING["vertical_slash"], EVERYTHING["block_sparse"]]),
    ):
        spoiled = state.out.isnan().any(-1)[0]
        assert spoiled[0].all() if where != "query" else spoiled[0, 299]
        assert not spoiled[1, :299].any() if where == "query" else spoiled[1].all()


def test_no_queries_and_bad_input():
    query, keys, values, scale = peaky(T=70, S=90)
    dense = [EVERYTHING["dense"]] * query.shape[1]
    for nothing in (
        attend_patterns(query[:, :, :0], keys, values, scale, dense),
        attend_adaptive(query[:, :, :0], keys, values, scale, 0.9)[0],
    ):
        assert nothing.out.shape == (1, 4, 0, 64)
    with pytest.raises(ValueError, match=r"one pattern per query head \(4\), got 2"):
        attend_patterns(query, keys, values, scale, dense[:2])
    with pytest.raises(ValueError, match="at least as many keys as queries, got 60 keys and 70 queries"):
        attend_adaptive(query, keys[:, :, :60], values[:, :, :60], scale, 0.9)
    with pytest.raises(ValueError, match=r"mass must be above 0 and below 1 .* got 1\.5"):
        attend_adaptive(query, keys, values, scale, 1.5)
    with pytest.raises(
        ValueError, match="kinds must be some of a_shape, vertical_slash, block_sparse, near_best, got x"
    ):
        attend_adaptive(query, keys, values, scale, 0.9, ["x"])
    with pytest.raises(ValueError, match="heads H a multiple of G"):
        attend_adaptive(query[:, :3], keys, values, scale, 0.9)
