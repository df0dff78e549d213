import logging

import pytest
import torch
from peaky import DIMS, DTYPES, RATIOS, float32_rounding, peaky

from retrieval_attn.kernels import attend_dense, merge, reference
from retrieval_attn.kernels import dense as prefill


def in_own_dtype(query, keys, values, scale, causal=False):
    """The same mathematics with every step rounded to the dtype of the inputs."""
    R, T, S = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    scores = query @ keys.repeat_interleave(R, 1).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
    return scores.softmax(-1) @ values.repeat_interleave(R, 1), scores.logsumexp(-1)


def assert_as_exact_as_its_dtype(state, *inputs):
    true = reference.attend_dense(*(x.double() if torch.is_tensor(x) else x for x in inputs))
    plain_out, plain_lse = in_own_dtype(*inputs)
    assert state.out.dtype == inputs[0].dtype
    assert state.lse.dtype == torch.float32
    assert state.out.shape == true.out.shape
    for ours, plain, exact in ((state.out, plain_out, true.out), (state.lse, plain_lse, true.lse)):
        allowed = 2 * (plain.double() - exact).abs().max() + float32_rounding(true)
        assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 1000), (63, 63), (63, 1000), (200, 300), (1000, 1000)])
def test_lengths(dtype, causal, T, S):
    inputs = peaky(G=1, T=T, S=S, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_dense(*inputs, causal), *inputs, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("R", RATIOS)
def test_group_ratios(dtype, causal, R):
    inputs = peaky(R=R, T=40, S=100, B=2, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_dense(*inputs, causal), *inputs, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [*DIMS, 96, 7])
def test_head_dimensions(dtype, causal, D):
    inputs = peaky(D=D, T=33, S=70, dtype=dtype)
    assert_as_exact_as_its_dtype(attend_dense(*inputs, causal), *inputs, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_strided_inputs(causal):
    """The fused CPU kernel reads wrong elements, silently, if a row's elements are not neighbours."""
    query, keys, values, scale = peaky(T=9, S=50, B=2)
    inputs = (query.mT.contiguous().mT, keys.transpose(1, 2).contiguous().transpose(1, 2), values.mT.contiguous().mT)
    assert_as_exact_as_its_dtype(attend_dense(*inputs, scale, causal), *inputs, scale, causal)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_no_keys_or_no_queries(T, S):
    """The fused CPU kernel divides by these lengths: the process ended with SIGFPE."""
    query, keys, values, scale = peaky(T=6, S=6)
    state = attend_dense(query[:, :, :T], keys[:, :, :S], values[:, :, :S], scale)
    assert state.out.shape == (1, 4, T, 64)
    assert not state.out.any()
    assert (state.lse == -torch.inf).all()


def test_tiles_merge_to_the_whole():
    query, keys, values, scale = peaky(T=64, S=500)
    past = [attend_dense(query, keys[:, :, s : s + 100], values[:, :, s : s + 100], scale) for s in range(0, 436, 100)]
    past[-1] = attend_dense(query, keys[:, :, 400:436], values[:, :, 400:436], scale)
    chunk = attend_dense(query, keys[:, :, 436:], values[:, :, 436:], scale, causal=True)
    assert_as_exact_as_its_dtype(merge(chunk, *past), query, keys, values, scale, True)


def test_keys_of_another_dtype_are_converted():
    query, keys, values, scale = peaky(T=9, S=50)
    keys, values = keys.bfloat16(), values.bfloat16()
    state = attend_dense(query, keys, values, scale)
    assert_as_exact_as_its_dtype(state, query, keys.float(), values.float(), scale)


class TestPlainPath:
    """What runs where no fused kernel fits."""

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        monkeypatch.setattr(prefill, "TILE", 16)
        prefill._pick_engine.cache_clear()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("T", "S"), [(1, 1), (16, 16), (17, 40), (50, 50), (63, 100)])
    def test_values_of_another_dimension(self, dtype, causal, T, S):
        inputs = peaky(T=T, S=S, D=64, Dv=24, dtype=dtype)
        assert_as_exact_as_its_dtype(attend_dense(*inputs, causal), *inputs, causal)

    def test_says_so_once_with_its_reason(self, caplog):
        inputs = peaky(T=3, S=9, D=64, Dv=24)
        with caplog.at_level(logging.WARNING, "retrieval_attn"):
            attend_dense(*inputs)
            attend_dense(*inputs)
        assert [r.getMessage() for r in caplog.records] == [
            "dense attention runs in plain PyTorch, which is slower: the fused kernel wants keys and values of one "
            "dimension, got torch.float32 of dimension 64 and 24"
        ]

    def test_same_dimensions_stay_fused(self, caplog):
        attend_dense(*peaky(T=3, S=9))
        assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "at least as many keys as queries, got 3 keys and 5 queries"),
        ({"query": torch.zeros(1, 3, 5, 64)}, "heads H a multiple of G"),
        ({"query": torch.zeros(4, 5, 64)}, "must be \\(B, heads, length, D\\)"),
        ({"values": torch.zeros(1, 2, 4, 64)}, "must agree"),
        ({"keys": torch.zeros(1, 2, 3, 64, device="meta")}, "one device, got cpu, meta, cpu"),
    ],
)
def test_names_what_does_not_fit(change, message):
    query, keys, values, scale = peaky(T=5, S=3)
    with pytest.raises(ValueError, match=message):
        attend_dense(**{"query": query, "keys": keys, "values": values, "scale": scale} | change)


def test_cuda_engine_is_the_fused_kernel_of_the_card(monkeypatch):
    device = torch.device("cuda")
    picked = {}
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        picked[capability] = [
            getattr(prefill._pick_cuda_engine(device, dtype, D, Dv), "__name__", None)
            for dtype, D, Dv in (
                (torch.bfloat16, 128, 128),
                (torch.float16, 128, 128),
                (torch.float32, 128, 128),
                (torch.bfloat16, 192, 128),
                (torch.float16, 512, 512),
                (torch.float32, 20, 20),
            )
        ]
    flash, efficient = "_cuda_flash", "_cuda_efficient"
    assert picked[8, 0] == [flash, flash, efficient, efficient, efficient, None]
    assert picked[7, 5] == [None, efficient, efficient, None, efficient, None]
