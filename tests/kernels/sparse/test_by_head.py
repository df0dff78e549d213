import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from peaky import DTYPES, float32_rounding, peaky

from retrieval_attn.kernels import HeadPattern, attend_adaptive, attend_dense, attend_patterns, reference
from retrieval_attn.kernels.sparse import by_head as sparse_prefill

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
    T=st.integers(1, 200),
    past=st.integers(0, 200),
    R=st.sampled_from([1, 2, 4]),
    kinds=st.lists(st.sampled_from(sorted(EVERYTHING)), min_size=8, max_size=8),
)
@examples(40)
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
@examples(30)
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


@pytest.mark.parametrize("kinds", [["a_shape", "vertical_slash", "block_sparse"], None])
def test_heads_may_be_looked_at_in_any_slices(monkeypatch, kinds):
    """As a GPU does, some groups at once, or all."""
    query, keys, values, scale = local_groups(4, 2, 600, 1000)
    found = []
    for step in (1, 2, 3, 4):
        monkeypatch.setattr(sparse_prefill, "groups_at_once", lambda query, keys, step=step: step)
        found.append(attend_adaptive(query, keys, values, scale, 0.98, kinds))
    assert len({choice.kind for choice in found[0][1]}) > 1
    for state, choices in found[1:]:
        assert [choice.kind for choice in choices] == [choice.kind for choice in found[0][1]]
        torch.testing.assert_close(state.out, found[0][0].out)


def test_heads_of_one_pattern_among_others_read_their_own_keys():
    query, keys, values, scale = local_groups(3, 2, 300, 900)
    few = [HeadPattern("vertical_slash", 40, 130), HeadPattern("block_sparse", 5), HeadPattern("dense")]
    patterns = [few[i] for i in (0, 1, 1, 0, 2, 0)]
    state = attend_patterns(query, keys, values, scale, patterns)
    for h, pattern in enumerate(patterns):
        g = slice(h // 2, h // 2 + 1)
        alone = attend_patterns(query[:, h : h + 1], keys[:, g], values[:, g], scale, [pattern])
        torch.testing.assert_close(state.out[:, h : h + 1], alone.out)


def local_groups(G, R, T, S):
    """Groups of heads of which every other looks about itself, at keys of its own, and the rest at nothing much."""
    query, keys, values, scale = peaky(G=G, R=R, T=T, S=S, D=32)
    query *= 0.01
    for g in range(0, G, 2):
        for x, offset in ((query[:, g * R : (g + 1) * R], S - T), (keys[:, g : g + 1], 0)):
            phase = (0.003 + 0.001 * g) * (offset + torch.arange(x.shape[2]))
            x *= 0.01
            x[..., 0], x[..., 1] = 90 * phase.cos(), 90 * phase.sin()
    return query, keys, values, scale


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
