"""The kernel in Triton's interpreter, on the CPU: about 0.05 s a program, so everything is short."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples, some_of
from peaky import float32_rounding, in_own_dtype, peaky

from retrieval_attn.kernels import reference
from retrieval_attn.kernels.sparse import attend as sparse
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.on_gpu import attend_sparse, launch

DTYPES = [torch.float16, torch.float32]

# What a list may hold after its end: positions that exist, too.
GARBAGE = [1, 2**31 - 1, -(2**31), -1, 10**6]

# Kernels may be quicker with lists in order, but not more right.
ORDERS = [list, lambda x: x[::-1], lambda x: [x[i] for i in torch.randperm(len(x))]]


def index_of(lists, rows=64, width=64, garbage=GARBAGE):
    """lists: [B][H][N] pairs of (starts of blocks, columns), as a SparseIndex whose rows end in garbage."""

    def tensors(of_run):
        found = [[[of_run(run) for run in head] for head in batch] for batch in lists]
        longest = max(len(x) for batch in found for head in batch for x in head) + 2
        padded = [[[[*x, *garbage, *garbage * longest][:longest] for x in head] for head in batch] for batch in found]
        counts = [[[len(x) for x in head] for head in batch] for batch in found]
        return torch.tensor(padded, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)

    return SparseIndex(*tensors(lambda run: run[0]), *tensors(lambda run: run[1]), rows, width)


def random_index(query, keys, rows=64, width=64, density=0.5):
    """Blocks at any distance of each other, from before the first key to past the last, and columns between them."""
    B, H, T, _ = query.shape
    S = keys.shape[2]

    def run():
        starts, at = [], -int(torch.randint(0, 2 * width, ()))
        while at < S + width:
            if torch.rand(()) < density:
                starts.append(at)
                at += width
            at += int(torch.randint(1, width, ()))
        starts = ORDERS[int(torch.randint(len(ORDERS), ()))](starts)
        free = set(range(-3, S + 3)) - {s + i for s in starts for i in range(width)}
        columns = [c for c in sorted(free) if torch.rand(()) < density]
        return starts, columns

    return index_of([[[run() for _ in range(-(-T // rows))] for _ in range(H)] for _ in range(B)], rows, width)


def assert_as_exact_as_its_dtype(query, keys, values, scale, index):
    """At most twice the error of plain code in the same dtype, both against float64."""
    T, S = query.shape[2], keys.shape[2]
    state = attend_sparse(query, keys, values, scale, index)
    true = reference.attend_sparse(query.double(), keys.double(), values.double(), scale, index)
    listed = reference.listed_keys(index, S).repeat_interleave(index.rows, 2)[:, :, :T]
    plain = in_own_dtype(query, keys, values, scale, listed & torch.ones(T, S, dtype=torch.bool).tril(S - T))
    assert state.out.dtype == query.dtype
    assert state.lse.dtype == torch.float32
    alive = true.lse > -torch.inf
    assert torch.equal(state.lse > -torch.inf, alive)
    assert not state.out.isnan().any()
    assert not state.out[~alive].any()
    if alive.any():
        for ours, other, exact in zip(state, plain, true, strict=True):
            allowed = 2 * (other.double() - exact)[alive].abs().max() + float32_rounding(true)
            assert (ours.double() - exact)[alive].abs().max() <= allowed
    return state


@pytest.mark.parametrize(
    ("lengths", "dtype"), some_of([(1, 1), (1, 130), (63, 63), (63, 300), (130, 130), (130, 300)], DTYPES)
)
def test_lengths_and_offsets(dtype, lengths):
    T, S = lengths
    inputs = peaky(G=1, R=1, T=T, S=S, dtype=dtype)
    assert_as_exact_as_its_dtype(*inputs, random_index(*inputs[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "T", "S"), [(96, 70, 150), (128, 70, 150), (256, 20, 90)])
def test_head_dimensions(dtype, D, T, S):
    inputs = peaky(G=1, R=1, T=T, S=S, D=D, dtype=dtype)
    assert_as_exact_as_its_dtype(*inputs, random_index(*inputs[:2]))


@pytest.mark.parametrize("R", [1, 4])
def test_group_ratios_and_batches(R):
    inputs = peaky(R=R, T=20, S=100, B=2)
    assert_as_exact_as_its_dtype(*inputs, random_index(*inputs[:2]))


@pytest.mark.parametrize(("size", "dtype"), some_of([(16, 128), (128, 16), (32, 64), (128, 128)], DTYPES))
def test_sizes_of_runs_and_blocks(dtype, size):
    """Runs and blocks larger than a tile are taken in parts, in float32 at any of these sizes."""
    inputs = peaky(G=1, R=1, T=140, S=200, dtype=dtype)
    assert_as_exact_as_its_dtype(*inputs, random_index(*inputs[:2], *size))


sizes = st.sampled_from([16, 32, 64])


@given(st.integers(1, 70), st.integers(0, 90), sizes, sizes, st.floats(0, 1), st.integers(0, 2**32))
@examples(20)
def test_any_index(T, past, rows, width, density, seed):
    torch.manual_seed(seed)
    query, keys, *rest = peaky(G=1, R=1, T=T, S=past + T)
    index = random_index(query, keys, rows, width, density)
    for sharpness in (1, 0.05):
        assert_as_exact_as_its_dtype(sharpness * query, keys, *rest, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_listed_is_dense_attention(dtype):
    inputs = peaky(G=1, T=100, S=130, dtype=dtype)
    index = index_of([[[([2, 66], [0, 1])] * 2] * 2])
    assert_as_exact_as_its_dtype(*inputs, index)
    wide = [x.double() for x in inputs[:3]]
    listed = reference.attend_sparse(*wide, inputs[3], index)
    dense = reference.attend_dense(*wide, inputs[3], causal=True)
    assert all(torch.equal(x, y) for x, y in zip(listed, dense, strict=True))


def test_runs_without_keys_are_empty():
    """The first run lists nothing, the second only what is to come, the third a key that half its queries see."""
    inputs = peaky(G=1, R=1, T=48, S=60)
    state = assert_as_exact_as_its_dtype(*inputs, index_of([[[([], []), ([50], [44]), ([], [52])]]], rows=16, width=16))
    assert (state.lse > -torch.inf).tolist() == [[[False] * 40 + [True] * 8]]
    assert not state.out[:, :, :40].any()


@pytest.mark.parametrize("end", [49, 50, 51, 52, 65])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_blocks_that_end_around_the_first_query_of_a_run(end, order):
    """Position 50 is the first query's own: a block that reaches it needs no mask, one more key does."""
    query, *rest = peaky(G=1, R=1, T=16, S=66)
    starts = [(-5, end - 31, end - 15)[i] for i in order]
    # Attention is nearly flat: one key too many shows, whichever it is.
    assert_as_exact_as_its_dtype(query / 20, *rest, index_of([[[(starts, [13])]]], rows=16, width=16))


def test_lists_longer_than_what_is_looked_through_at_a_time():
    inputs = peaky(G=1, R=1, T=3, S=5000)
    falling = list(range(4984, -32, -32))
    for order in ORDERS:
        assert_as_exact_as_its_dtype(*inputs, index_of([[[(order(falling), [])]]], rows=16, width=16))


def test_blocks_over_both_ends():
    """Nothing before the first key or past the last is read, even where the numbers of its positions overflow."""
    query, keys, values, scale = peaky(G=1, R=1, T=20, S=50)
    runs = [([-(2**31), -64, -30, 34], []), ([-63, 40, 2**31 - 64, 2**31 - 1], [2**31 - 1])]
    around = torch.full((1, 1, 450, 64), torch.nan)
    around[:, :, 200:250] = keys
    assert_as_exact_as_its_dtype(query, around[:, :, 200:250], values, scale, index_of([[runs]], rows=16))


def test_reaches_a_needle_in_a_column_and_none_that_is_not_listed():
    query, keys, values, scale = peaky(G=1, R=1, T=40, S=200)
    query[:] = 4 * keys[:, :, [70]]
    listed, without = (index_of([[[([100, 164], columns)]]]) for columns in ([3, 70, 90], [3, 90]))
    state = assert_as_exact_as_its_dtype(query, keys, values, scale, listed)
    torch.testing.assert_close(state.out, values[:, :, [70]].expand_as(state.out), rtol=0, atol=1e-3)
    before = assert_as_exact_as_its_dtype(query, keys, values, scale, without)
    seen = reference.listed_keys(without, 200)[0, 0, 0]
    keys[:, :, ~seen], values[:, :, ~seen] = torch.nan, torch.nan
    after = attend_sparse(query, keys, values, scale, without)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_scores_far_from_zero():
    query, keys, values, scale = peaky(G=1, R=1, T=40, S=100)
    assert_as_exact_as_its_dtype(query * 100, keys, values, scale, random_index(query, keys))
    assert_as_exact_as_its_dtype(query, keys, values, -scale, random_index(query, keys))


def test_what_follows_a_list_means_nothing():
    query, keys, values, scale = peaky(G=1, R=1, T=70, S=90)
    lists = [[[([64], list(range(20, 60))), ([], [3, 8])]]]
    states = [attend_sparse(query, keys, values, scale, index_of(lists, garbage=[g])) for g in GARBAGE]
    for state in states[1:]:
        assert all(torch.equal(x, y) for x, y in zip(state, states[0], strict=True))


def test_any_strides():
    query, keys, values, scale = peaky(R=1, T=20, S=70, B=2)
    index = index_of([[[([0], [64, 67])]]])
    spread = SparseIndex(*(x.expand(2, 2, *x.shape[2:]) for x in index[:4]))
    whole = assert_as_exact_as_its_dtype(query, keys, values, scale, spread)
    inputs = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([keys, keys], -1)[..., :64],
        values.mT.contiguous().mT,
    )
    before = [x.clone() for x in inputs]
    strided = attend_sparse(*inputs, scale, spread)
    assert all(torch.equal(x, y) for x, y in zip(strided, whole, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_has_the_signature_of_what_dispatches_to_it():
    assert inspect.signature(attend_sparse) == inspect.signature(sparse.attend_sparse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": 80}, "head dimension must be one of 64, 96, 128, 256 on a GPU, got 80"),
        ({"rows": 48}, "index.rows must be one of 16, 32, 64, 128 on a GPU, got 48"),
        ({"width": 256}, "index.width must be one of 16, 32, 64, 128 on a GPU, got 256"),
    ],
)
def test_names_what_is_not_supported(change, message):
    asked = {"D": 64, "rows": 64, "width": 64} | change
    query, keys, values, scale = peaky(G=1, R=1, T=5, S=9, D=asked["D"])
    with pytest.raises(ValueError, match=message):
        attend_sparse(query, keys, values, scale, index_of([[[([0], [])]]], asked["rows"], asked["width"]))


def test_tiles_never_exceed_runs_and_blocks():
    for capability in (8, 9):
        for dtype in (torch.float16, torch.float32):
            for size in (16, 128):
                constants = launch(128, dtype, size, size, capability).constants
                assert size % constants["BLOCK_M"] == size % constants["BLOCK_N"] == 0
