import pytest
import torch

from retrieval_attn.kernels import attend_near, reference

LENGTHS = [1, 63, 1000]
RATIOS = [1, 2, 4, 7]
DIMS = [8, 64, 80, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def peaky(G=2, R=2, T=1, S=63, D=64, Dv=None, B=1, dtype=torch.float32):
    """Inputs whose softmax is nearly one-hot: every query holds a multiple of one key, plus noise."""
    keys, values = torch.randn(B, G, S, D), torch.randn(B, G, S, Dv or D)
    needle = torch.randint(0, S, (B, G, R * T))
    chosen = keys.gather(2, needle[..., None].expand(-1, -1, -1, D))
    query = (2 * chosen + torch.randn_like(chosen)).view(B, G * R, T, D)
    return query.to(dtype), keys.to(dtype), values.to(dtype), D**-0.5


def in_own_dtype(query, keys, values, scale, mask=None):
    """The same mathematics with every step rounded to the dtype of the inputs."""
    R = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(R, 1).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ values.repeat_interleave(R, 1), scores.logsumexp(-1)


def assert_as_exact_as_its_dtype(state, *inputs):
    """The rule of the house: at most twice the error of plain code in the same dtype, both against float64."""
    tensors = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    true = reference.attend_near(*tensors)
    plain_out, plain_lse = in_own_dtype(*inputs)
    assert state.out.dtype == inputs[0].dtype
    assert state.lse.dtype == torch.float32
    assert state.out.shape == true.out.shape
    alive = true.lse > -torch.inf
    assert torch.equal(state.lse > -torch.inf, alive)
    assert not state.out.isnan().any()
    assert not state.out[~alive].any()
    if alive.any():
        for ours, plain, exact in ((state.out, plain_out, true.out), (state.lse, plain_lse, true.lse)):
            allowed = 2 * (plain.double() - exact)[alive].abs().max() + float32_rounding(true)
            assert (ours.double() - exact)[alive].abs().max() <= allowed


def float32_rounding(true):
    """What another order of summation may change: a unit in the last place of a float32 score, which is about lse."""
    alive = true.lse > -torch.inf
    return 2 * torch.finfo(torch.float32).eps * (1 + true.lse[alive].abs().max()) * (1 + true.out.abs().max())


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
