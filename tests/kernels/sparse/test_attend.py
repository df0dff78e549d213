import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from peaky import DTYPES, float32_rounding, peaky

from retrieval_attn.kernels import SparseIndex, attend_sparse, reference


def random_index(B, H, T, S, rows=64, width=16, n_blocks=3, n_columns=20, seed=0, diagonal=True):
    """Any blocks and columns that do not overlap, with nonsense in the unused places."""
    make = torch.Generator().manual_seed(seed)
    N = -(-T // rows)
    shape = (B, H, N)
    blocks = torch.full((*shape, n_blocks + rows // width + 2), 2**31 - 1, dtype=torch.int32)
    columns = torch.full((*shape, n_columns), -(2**31), dtype=torch.int32)
    counts = torch.zeros((2, *shape), dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for n in range(N):
                first = S - T + n * rows
                starts = set(range(first, first + rows, width)) if diagonal else set()
                for start in torch.randint(-width + 1, S, (n_blocks,), generator=make).tolist():
                    if all(abs(start - other) >= width for other in starts):
                        starts.add(start)
                free = [j for j in range(S) if not any(start <= j < start + width for start in starts)]
                some = torch.randperm(len(free), generator=make)[
                    : int(torch.randint(0, n_columns + 1, (1,), generator=make))
                ]
                singles = sorted(free[i] for i in some.tolist())
                for x, row, i in ((blocks, sorted(starts), 0), (columns, singles, 1)):
                    x[b, h, n, : len(row)] = torch.tensor(row, dtype=torch.int32)
                    counts[i, b, h, n] = len(row)
    return SparseIndex(blocks, counts[0], columns, counts[1], rows, width)


def everything(B, H, T, S, rows=64, width=16):
    """An index that lists every key."""
    N = -(-T // rows)
    starts = torch.arange(0, S, width, dtype=torch.int32).expand(B, H, N, -1)
    none = torch.zeros((B, H, N), dtype=torch.int32)
    return SparseIndex(starts, none + starts.shape[3], torch.empty((B, H, N, 0), dtype=torch.int32), none, rows, width)


def in_own_dtype(query, keys, values, scale, index):
    """The same mathematics with every step rounded to the dtype of the inputs."""
    T, S = query.shape[2], keys.shape[2]
    R = query.shape[1] // keys.shape[1]
    mask = reference.listed_keys(index, S).repeat_interleave(index.rows, 2)[:, :, :T]
    mask = mask & (torch.arange(S) <= torch.arange(S - T, S)[:, None])
    scores = (query @ keys.repeat_interleave(R, 1).mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ values.repeat_interleave(R, 1), scores.logsumexp(-1)


def assert_as_exact_as_its_dtype(state, *inputs):
    true = reference.attend_sparse(*(x.double() if torch.is_tensor(x) else x for x in inputs))
    plain = in_own_dtype(*inputs)
    assert state.out.dtype == inputs[0].dtype
    assert state.lse.dtype == torch.float32
    empty = true.lse == -torch.inf
    assert torch.equal(state.lse == -torch.inf, empty)
    assert not state.out[empty].any()
    if empty.all():
        return
    for ours, own, exact in zip(state, plain, true, strict=True):
        own, exact, ours = (x.double().nan_to_num(neginf=0) for x in (own, exact, ours))
        assert (ours - exact).abs().max() <= 2 * (own - exact).abs().max() + float32_rounding(true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 300), (63, 63), (63, 300), (130, 130), (200, 333), (300, 1000)])
@pytest.mark.parametrize("diagonal", [True, False])
def test_lengths(dtype, T, S, diagonal):
    inputs = peaky(G=1, T=T, S=S, dtype=dtype)
    index = random_index(1, inputs[0].shape[1], T, S, diagonal=diagonal)
    assert_as_exact_as_its_dtype(attend_sparse(*inputs, index), *inputs, index)


@given(
    T=st.integers(1, 150),
    past=st.integers(0, 150),
    R=st.sampled_from([1, 2, 4]),
    rows=st.sampled_from([16, 64, 128]),
    width=st.sampled_from([16, 64]),
    n_blocks=st.integers(0, 4),
    n_columns=st.integers(0, 40),
    seed=st.integers(0, 999),
    diagonal=st.booleans(),
)
@examples(60)
def test_any_index_is_what_the_mask_says(T, past, R, rows, width, n_blocks, n_columns, seed, diagonal):
    inputs = peaky(B=2, G=1, R=R, T=T, S=T + past, D=16)
    width = min(width, rows)
    index = random_index(2, R, T, T + past, rows, width, n_blocks, n_columns, seed, diagonal)
    assert_as_exact_as_its_dtype(attend_sparse(*inputs, index), *inputs, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_key_listed_is_dense_attention(dtype):
    inputs = peaky(T=200, S=300, dtype=dtype)
    index = everything(1, inputs[0].shape[1], 200, 300)
    assert_as_exact_as_its_dtype(attend_sparse(*inputs, index), *inputs, index)
    dense = reference.attend_dense(*inputs, causal=True)
    assert torch.equal(reference.attend_sparse(*inputs, index).out, dense.out)


def test_a_needle_is_found_where_it_is_listed_and_nowhere_else():
    """One key outweighs all others; only run 1 of head 0 lists it."""
    query, keys, values, scale = peaky(G=1, R=2, T=128, S=256)
    query[:] = query[0, 0, 0]
    keys[0, 0, 37] = 5 * query[0, 0, 0]
    index = random_index(1, 2, 128, 256, n_blocks=0, n_columns=0)
    columns = torch.full((1, 2, 2, 1), 37, dtype=torch.int32)
    n_columns = torch.tensor([[[0, 1], [0, 0]]], dtype=torch.int32)
    state = attend_sparse(query, keys, values, scale, index._replace(columns=columns, n_columns=n_columns))
    near = torch.isclose(state.out, values[0, 0, 37].expand_as(state.out), atol=1e-2).all(-1)[0]
    assert near[0, 64:].all()
    assert not near[0, :64].any()
    assert not near[1].any()


def test_strided_inputs_and_no_queries():
    query, keys, values, scale = peaky(T=70, S=90, B=2)
    index = random_index(2, query.shape[1], 70, 90)
    inputs = (query.mT.contiguous().mT, keys.transpose(1, 2).contiguous().transpose(1, 2), values.mT.contiguous().mT)
    assert_as_exact_as_its_dtype(attend_sparse(*inputs, scale, index), *inputs, scale, index)
    nothing = SparseIndex(*(x[:, :, :0] for x in index[:4]), index.rows, index.width)
    assert attend_sparse(query[:, :, :0], keys, values, scale, nothing).out.shape == (2, query.shape[1], 0, 64)


def test_lists_that_are_longer_than_they_may_be_are_refused():
    """They wrote past the end of a buffer, and so did keys listed many times."""
    query, keys, values, scale = peaky(T=64, S=64)
    index = everything(1, query.shape[1], 64, 64)
    with pytest.raises(ValueError, match=r"index\.n_blocks must be between 0 and 4, got 5 to 5"):
        attend_sparse(query, keys, values, scale, index._replace(n_blocks=index.n_blocks + 1))
    with pytest.raises(ValueError, match=r"index\.n_columns must be between 0 and 0, got -1 to -1"):
        attend_sparse(query, keys, values, scale, index._replace(n_columns=index.n_columns - 1))
    twice = index._replace(blocks=index.blocks.repeat(1, 1, 1, 500), n_blocks=index.n_blocks * 500)
    with pytest.raises(ValueError, match="index must list no key twice in a run, got 32000 keys of 64 in run 0"):
        attend_sparse(query, keys, values, scale, twice)


def test_bad_input_is_named():
    query, keys, values, scale = peaky(T=70, S=90)
    index = random_index(1, query.shape[1], 70, 90)
    with pytest.raises(ValueError, match="at least as many keys as queries, got 60 keys and 70"):
        attend_sparse(query, keys[:, :, :60], values[:, :, :60], scale, index)
    with pytest.raises(ValueError, match=r"index\.blocks must be int32 of shape \(1, 4, 1\)"):
        attend_sparse(query[:, :, :64], keys, values, scale, index)
    with pytest.raises(ValueError, match=r"index\.n_columns must be int32 .* got torch.int64"):
        attend_sparse(query, keys, values, scale, index._replace(n_columns=index.n_columns.long()))
    with pytest.raises(ValueError, match="must all be float16, bfloat16 or float32, got float32, float64, float32"):
        attend_sparse(query, keys.double(), values, scale, index)
    with pytest.raises(ValueError, match="one dimension, got 64 and 32"):
        attend_sparse(query, keys, values[..., :32], scale, index)
