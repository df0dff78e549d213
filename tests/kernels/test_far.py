import numpy as np
import pytest
import torch
from peaky import COMPILED, DIMS, LENGTHS, RATIOS, float32_rounding, peaky

from retrieval_attn.kernels import attend_dense, attend_far, reference


def lookup(G=2, R=2, T=1, S=1000, K=20, **shape):
    """One sequence in host memory and ids as an index returns them: some short rows, every needle found."""
    query, keys, values, scale = peaky(G=G, R=R, T=T, S=S, **shape)
    K = min(K, S)
    ids = torch.rand(G * R, T, S).argsort(-1)[..., :K].int()
    best = (query.float() @ keys.float().repeat_interleave(R, 1).mT)[0].argmax(-1).int()
    ids[..., 0] = best
    ids[0, :, K // 2 + 1 :] = -1
    return query, keys[0], values[0], ids.numpy(), scale


def assert_as_exact_as_its_dtype(state, query, keys, values, ids, scale, share_group=True):
    """Kernels read bfloat16 but count in float32: our bound is the error of plain float32, plus the rounding of out."""
    numbers = (query.double(), keys.double(), values.double(), ids, scale)
    true = reference.attend_far(*numbers, share_group=share_group)
    plain = reference.attend_far(query.float(), keys.float(), values.float(), ids, scale, share_group=share_group)
    assert state.out.dtype == query.dtype
    assert state.lse.dtype == torch.float32
    assert state.out.shape == true.out.shape
    assert torch.equal(state.lse.isinf(), true.lse.isinf())
    alive = true.lse > -torch.inf
    assert not state.out[~alive].any()
    if alive.any():
        out_rounding = torch.finfo(query.dtype).eps * true.out.abs().max()
        for ours, theirs, exact, extra in (
            (state.out, plain.out, true.out, out_rounding),
            (state.lse, plain.lse, true.lse, 0),
        ):
            allowed = 2 * (theirs.double() - exact)[alive].abs().max() + float32_rounding(true) + extra
            assert (ours.double() - exact)[alive].abs().max() <= allowed


@pytest.mark.parametrize("share_group", [True, False])
@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("R", RATIOS)
def test_lengths_and_group_ratios(share_group, dtype, S, R):
    inputs = lookup(R=R, S=S, T=2, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_far(*inputs, share_group=share_group), *inputs, share_group)


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("D", [*DIMS, 7])
def test_head_dimensions(dtype, D):
    inputs = lookup(D=D, R=5, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_far(*inputs), *inputs)


def as_int8(x):
    """Numbers from -127 to 127, and what one of them is worth."""
    unit = x.abs().max() / 127
    return (x / unit).round().to(torch.int8), unit


@pytest.mark.parametrize("share_group", [True, False])
@pytest.mark.parametrize(("S", "D", "R"), [(1, 64, 4), (63, 7, 5), (1000, 128, 4), (1000, 64, 1)])
def test_int8_is_read_as_plain_numbers(share_group, S, D, R):
    query, keys, values, ids, scale = lookup(S=S, D=D, R=R, T=2)
    (keys, unit), (values, _) = as_int8(keys), as_int8(values)
    inputs = query, keys, values, ids, scale * float(unit)
    assert_as_exact_as_its_dtype(attend_far(*inputs, share_group=share_group), *inputs, share_group)


@pytest.mark.long
def test_keys_and_values_may_differ_in_dtype():
    query, keys, values, ids, scale = lookup(dtype=torch.float16)
    keys, unit = as_int8(keys.float())
    inputs = query, keys.numpy(), values.numpy(), ids, scale * float(unit)
    assert_as_exact_as_its_dtype(attend_far(*inputs), query, keys, values, ids, scale * float(unit))


def test_values_of_another_dimension():
    inputs = lookup(D=64, Dv=24, T=3)
    assert_as_exact_as_its_dtype(attend_far(*inputs), *inputs)


@pytest.mark.parametrize("dtype", COMPILED)
def test_all_ids_is_full_attention(dtype):
    query, keys, values, _, scale = lookup(S=300, T=3, dtype=dtype)
    ids = np.tile(np.arange(300, dtype=np.int32), (4, 3, 1))
    far, dense = attend_far(query, keys, values, ids, scale), attend_dense(query, keys[None], values[None], scale)
    assert_as_exact_as_its_dtype(far, query, keys, values, ids, scale)
    true = reference.attend_dense(query.double(), keys[None].double(), values[None].double(), scale)
    error, dense_error = ((state.out.double() - true.out).abs().max() for state in (far, dense))
    assert error <= dense_error + float32_rounding(true)


@pytest.mark.parametrize("share_group", [True, False])
def test_an_id_named_twice_counts_once(share_group):
    query, keys, values, ids, scale = lookup()
    once = attend_far(query, keys, values, ids, scale, share_group=share_group)
    twice = attend_far(query, keys, values, np.concatenate([ids, ids], 2), scale, share_group=share_group)
    assert torch.equal(once.out, twice.out)
    assert torch.equal(once.lse, twice.lse)


def test_ids_that_fall_on_one_slot_are_all_kept():
    query, keys, values, _, scale = lookup(S=100_000, D=8)
    ids = np.arange(0, 4 * 4096, 4096, dtype=np.int32)[None, None].repeat(4, 0)
    ids = np.concatenate([ids, ids + 65_536, ids + 1], 2)
    assert_as_exact_as_its_dtype(attend_far(query, keys, values, ids, scale), query, keys, values, ids, scale)


def test_shared_group_attends_to_what_its_other_heads_found():
    query, keys, values, ids, scale = lookup()
    ids[1] = -1
    shared, own = (attend_far(query, keys, values, ids, scale, share_group=share) for share in (True, False))
    assert torch.isfinite(shared.lse).all()
    assert own.lse[0, 1] == -torch.inf
    assert not own.out[0, 1].any()
    assert (shared.lse >= own.lse).all()


@pytest.mark.parametrize("share_group", [True, False])
@pytest.mark.parametrize("below", ["drop", "raise"])
def test_scores_below_the_threshold_are_dropped_or_raised(below, share_group):
    query, keys, values, ids, scale = lookup(R=3, T=2)
    scale *= 0.1  # Flat enough for every key to count.
    scores = (query @ keys.repeat_interleave(3, 0).mT)[0] * scale
    # Between two scores, so that rounding cannot decide: above all in one head, below all in another.
    threshold = scores.take_along_dim(torch.from_numpy(ids).long().clamp_min(0), -1).sort(-1).values[..., 7:9].mean(-1)
    threshold[0], threshold[1] = torch.inf if below == "drop" else 50.0, -torch.inf
    options = {"share_group": share_group, "threshold": threshold, "below": below}
    ours = attend_far(query, keys, values, ids, scale, **options)
    true = reference.attend_far(query, keys, values, ids, scale, **options)
    assert torch.equal(ours.lse.isinf(), true.lse.isinf())
    assert (ours.lse[0, 0] == -torch.inf).all() == (below == "drop")
    assert torch.allclose(ours.out, true.out, atol=1e-5)
    assert torch.allclose(ours.lse, true.lse, atol=1e-5)
    without = attend_far(query, keys, values, ids, scale, share_group=share_group)
    assert torch.equal(ours.out[0, 1], without.out[0, 1])
    assert not torch.allclose(ours.out[0, 2:], without.out[0, 2:], atol=1e-2)


@pytest.mark.parametrize("K", [0, 5])
def test_no_ids_is_the_empty_state(K):
    query, keys, values, _, scale = lookup()
    state = attend_far(query, keys, values, np.full((4, 1, K), -1, np.int32), scale)
    assert (state.lse == -torch.inf).all()
    assert not state.out.any()


def test_no_keys_is_the_empty_state():
    query, keys, values, ids, scale = lookup(T=3)
    state = attend_far(query, keys[:, :0], values[:, :0], np.full_like(ids, -1), scale)
    assert (state.lse == -torch.inf).all()
    assert state.out.shape == (1, 4, 3, 64)


@pytest.mark.parametrize("dtype", COMPILED)
def test_strided_keys_are_read_in_place(dtype):
    query, keys, values, ids, scale = lookup(T=2, dtype=dtype)
    expected = attend_far(query, keys, values, ids, scale)
    both = torch.cat([keys, values], -1).transpose(0, 1).contiguous().transpose(0, 1)
    state = attend_far(query, both[..., :64], both[..., 64:], ids, scale)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_numpy_and_three_axes_are_taken():
    query, keys, values, ids, scale = lookup()
    expected = attend_far(query, keys, values, ids, scale)
    state = attend_far(query[0], keys.numpy(), values.numpy(), torch.from_numpy(ids), scale)
    assert torch.equal(state.out, expected.out)


def test_output_is_fully_written(monkeypatch):
    inputs = lookup(T=2)
    inputs[3][:2] = -1
    expected = attend_far(*inputs)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    state = attend_far(*inputs)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_leaves_its_arguments_unchanged():
    inputs = lookup()
    before = [x.clone() if torch.is_tensor(x) else np.copy(x) for x in inputs]
    attend_far(*inputs)
    assert all(np.array_equal(x, y) for x, y in zip(before, inputs, strict=True))


@pytest.mark.parametrize("bad", [1000, 2**31 - 1, -2])
def test_ids_out_of_range_are_refused(bad):
    query, keys, values, ids, scale = lookup()
    ids[3, 0, 7] = bad
    with pytest.raises(ValueError, match=rf"between -1 \(none\) and 999 \(the last key\), got {bad}"):
        attend_far(query, keys, values, ids, scale)


def test_nan_is_named_not_passed_on():
    query, keys, values, ids, scale = lookup()
    keys[1, ids[2, 0, 0], 3] = torch.nan
    with pytest.raises(ValueError, match="scores of head 2 hold NaN or infinity"):
        attend_far(query, keys, values, ids, scale)
    query[0, 1, 0, 5] = torch.nan
    with pytest.raises(ValueError, match="query holds NaN in head 1"):
        attend_far(query, keys, values, ids, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((4, 1, 3), np.int64)}, "ids must be int32, got int64"),
        ({"threshold": np.zeros(4, np.float32)}, r"threshold must be \(4, 1\)"),
        ({"threshold": np.full((4, 1), np.nan)}, "without NaN"),
        ({"below": "keep"}, "below must be one of drop, raise, got 'keep'"),
        ({"ids": np.zeros((2, 1, 3), np.int32)}, "must agree"),
        ({"query": torch.zeros(3, 1, 64)}, "must agree|multiple"),
        ({"query": torch.zeros(2, 4, 1, 64)}, r"must be \(1, H, T, D\)"),
        ({"keys": torch.zeros(2, 64, 1000).mT}, "each row of keys must be contiguous"),
        ({"keys": torch.zeros(2, 1000, 64, device="meta")}, "must be in CPU memory"),
    ],
)
def test_names_what_does_not_fit(change, message):
    query, keys, values, ids, scale = lookup()
    with pytest.raises(ValueError, match=message):
        attend_far(**{"query": query, "keys": keys, "values": values, "ids": ids, "scale": scale} | change)
