import pytest
import torch
from peaky import DIMS, DTYPES, LENGTHS, RATIOS, assert_as_exact_as_its_dtype, peaky

from retrieval_attn.kernels import attend_near, attend_window, near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("R", RATIOS)
def test_lengths_and_group_ratios(dtype, S, R):
    inputs = peaky(R=R, S=S, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("T", [1, 5])
def test_head_dimensions(dtype, D, T):
    inputs = peaky(D=D, T=T, S=200, B=2, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_another_dimension(dtype):
    inputs = peaky(D=64, Dv=24, T=3, S=100, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63,), (5, 63), (1, 1, 5, 63), (2, 4, 5, 63), (2, 1, 1, 63)])
def test_masks(dtype, shape):
    inputs = peaky(T=5, B=2, dtype=dtype)
    mask = torch.rand(shape) > 0.3
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


def test_row_without_keys_is_empty():
    inputs = peaky(T=5, S=20)
    mask = torch.ones(1, 4, 5, 20, dtype=torch.bool)
    mask[:, 1, 2] = False
    state = attend_near(*inputs, mask)
    assert state.lse[0, 1, 2] == -torch.inf
    assert not state.out[0, 1, 2].any()
    assert_as_exact_as_its_dtype(state, *inputs, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_empty_window_is_the_empty_state(masked):
    query, keys, values, scale = peaky(S=4, Dv=24)
    mask = torch.ones(1, 1, 1, 0, dtype=torch.bool) if masked else None
    state = attend_near(query, keys[:, :, :0], values[:, :, :0], scale, mask)
    assert state.out.shape == (1, 4, 1, 24)
    assert not state.out.any()
    assert (state.lse == -torch.inf).all()


@pytest.mark.parametrize("masked", [False, True])
def test_strided_inputs(masked):
    query, keys, values, scale = peaky(T=3, S=50)
    mask = torch.rand(3, 50) > 0.3 if masked else None
    inputs = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([keys, keys], -1)[..., :64],
        values.mT.contiguous().mT,
        scale,
    )
    assert_as_exact_as_its_dtype(attend_near(*inputs, mask), *inputs, mask)


def test_scores_far_from_zero():
    query, keys, values, scale = peaky(S=300)
    inputs = (query * 100, keys, values, scale)
    assert_as_exact_as_its_dtype(attend_near(*inputs), *inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(63), "mask must be bool"),
        (torch.ones(62, dtype=torch.bool), r"broadcastable to \(B, H, T, W\) = \(1, 4, 1, 63\)"),
    ],
)
def test_names_what_is_wrong_with_a_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        attend_near(*peaky(), mask)


@pytest.mark.parametrize(("T", "S", "window"), [(1, 40, 16), (300, 300, 16), (300, 315, 16), (20, 20, 100), (1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_window_is_what_its_mask_says(monkeypatch, T, S, window, masked):
    """Over all keys, by one mask; block by block, and over no more keys than a block sees, it is the same."""
    monkeypatch.setattr(near, "WINDOW_ROWS", 64)
    query, keys, values, scale = peaky(T=T, S=S, D=8, B=2)
    before = torch.arange(S - T, S)[:, None] - torch.arange(S)
    seen = ((before >= 0) & (before < window)).expand(2, 1, T, S).clone()
    if masked:
        # Padding on the left of the second row.
        seen[1, :, :, : S // 3] = False
    ours = attend_window(query, keys, values, scale, window, seen if masked else None)
    true = attend_near(query, keys, values, scale, seen)
    torch.testing.assert_close(ours.out, true.out)
    torch.testing.assert_close(ours.lse, true.lse)
    assert not torch.allclose(attend_window(query, keys, values, scale, window + 1).out, true.out) or window >= S
