import numpy as np
import pytest
import torch
from chosen_heads import D, S, T, left_out, made, single_needles
from coverage_checks import assert_named_once
from hypothesis import given
from hypothesis import strategies as st
from laws import examples

from retrieval_attn.kernels import reference
from retrieval_attn.kernels.sparse import by_head, near_best
from retrieval_attn.kernels.sparse.choose import choose
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.near_best import (
    ROUNDING,
    Chooser,
    count_near_best,
    is_quick,
    list_near_best,
    multiplies_bfloat16,
)
from retrieval_attn.kernels.sparse.probes import N_FIRST, N_NEAR


def scores_of(query, keys, scale, layout):
    """(h, T, S) scores less each head's mean key, -inf after the query; and what their products were rounded by."""
    keys = (keys - keys.mean(1, keepdim=True)).repeat_interleave(len(query) // len(keys), 0)
    scores = (query * scale) @ keys.mT
    future = torch.ones(layout.T, layout.S, dtype=torch.bool).triu(layout.past + 1)
    coarse = scale * query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)[:, None]
    return scores.masked_fill(future, -torch.inf), coarse * 2**-7


@given(
    n=st.integers(1, 200),
    past=st.integers(0, 400),
    R=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
    delta=st.sampled_from([0.5, 2.0, 6.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@examples(60)
def test_what_is_listed_is_near_the_best_of_some_query(n, past, R, seed, delta, dtype):
    make = torch.Generator().manual_seed(seed)
    layout = Layout(n, n + past)
    query = torch.randn((2 * R, n, 16), generator=make).to(dtype)
    keys = (3 * torch.randn((2, n + past, 16), generator=make) + 5).to(dtype)
    index = list_near_best(query, [Chooser(head, layout) for head in keys], 0.25, [delta] * 2 * R, layout)
    assert_named_once(index, layout.S)
    listed = reference.listed_keys(index, layout.S)[0]
    scores, coarse = scores_of(query.float(), keys.float(), 0.25, layout)
    below = scores.amax(2, keepdim=True) - scores
    margin = (
        coarse + coarse.amax(2, keepdim=True) + 2 * ROUNDING * scores.nan_to_num(neginf=0).abs().amax(2, keepdim=True)
    )
    for i in range(layout.n_runs):
        rows = slice(i * 64, (i + 1) * 64)
        start = past + i * 64
        surely = (below + margin < delta)[:, rows].any(1)
        perhaps = (below - margin <= delta)[:, rows].any(1)
        always = torch.zeros(layout.S, dtype=torch.bool)
        always[max(0, start - N_NEAR * 64) : start + 64] = True
        always[: min(N_FIRST, start)] = True
        assert (listed[:, i] | ~(surely | always)).all()
        assert (perhaps | always | ~listed[:, i]).all()


def test_needles_that_no_probe_knows_of_are_read():
    """Every query wants a key of its own: columns and diagonals leave it dense, a choice per run does not."""
    inputs = made(single_needles)
    (choice,), ((_, index),) = choose(*inputs, 0.98, Layout(T, S), ["vertical_slash", "near_best"])
    assert choice.kind == "near_best"
    read = reference.listed_keys(index, S)[0].float().mean() * S / (S - T / 2)
    assert choice.density == pytest.approx(float(read), abs=0.05)
    assert left_out(index, *inputs).square().mean().sqrt() <= 0.02


def test_heads_have_their_own_threshold_and_key_head():
    query, keys = torch.randn(4, 130, D), torch.randn(2, 700, D)
    layout = Layout(130, 700)
    choosers = [Chooser(head, layout) for head in keys]
    together = list_near_best(query, choosers, 0.5, [1.0, 2.0, 3.0, 4.0], layout)
    for h in range(4):
        alone = list_near_best(query[h : h + 1], choosers[h // 2 : h // 2 + 1], 0.5, [1.0 + h], layout)
        assert torch.equal(reference.listed_keys(together, 700)[0, h], reference.listed_keys(alone, 700)[0, 0])
    counted = count_near_best(query, choosers, 0.5, [1.0, 2.0, 3.0, 4.0], layout)
    assert torch.equal(counted, together.n_columns[0, :, 1].float())


@pytest.mark.parametrize("x", [[0.0, -0.0, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, 1e-40]])
def test_the_order_of_bfloat16_as_integers(x):
    x = torch.tensor(x).bfloat16().float()
    ordered = near_best._order(x)
    assert torch.equal(near_best._unordered(ordered), x)
    by_value = x.numpy()[np.argsort(ordered, kind="stable")]
    assert (np.diff(by_value) >= 0).all()


@pytest.fixture
def asked_anew():
    is_quick.cache_clear()
    yield
    is_quick.cache_clear()


@pytest.mark.parametrize(
    ("features", "most", "quick"),
    [
        ({"avx2", "avx512f", "avx512bf16"}, "", True),
        ({"amx-tile", "amx-bf16"}, "", True),
        ({"neon", "sve", "bf16"}, "", True),
        ({"avx2", "avx512f", "avx512vnni", "amx-int8"}, "", False),
        (set(), "", False),
        ({"avx512bf16"}, "avx512_core_vnni", False),
        ({"avx512bf16"}, "AVX2", False),
        ({"avx512bf16"}, "AVX512_CORE_BF16", True),
        ({"bf16"}, "SVE_128", True),
    ],
)
def test_flags_say_whether_products_of_bfloat16_are_quick(monkeypatch, asked_anew, features, most, quick):
    """A clock said it once, five products long: 20 times yes and 10 times no on one machine with other work."""
    known = dict.fromkeys(["avx2", "avx512f", "avx512bf16", "amx-bf16"], False) | dict.fromkeys(features, True)
    monkeypatch.setattr(near_best.llvmlite.binding, "get_host_cpu_features", lambda: known)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert multiplies_bfloat16(features, most) is is_quick() is quick


def test_without_onednn_nothing_is_quick(monkeypatch, asked_anew):
    monkeypatch.setattr(near_best.llvmlite.binding, "get_host_cpu_features", lambda: {"avx512bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_quick()


@pytest.mark.parametrize("quick", [True, False])
def test_what_the_flags_say_is_what_is_chosen_from(monkeypatch, quick):
    """Every query of the head wants a key of its own, which only a choice per run can give it."""
    query, keys, scale = made(single_needles)
    monkeypatch.setattr(by_head, "is_quick", lambda: quick)
    first, second = (by_head.attend_adaptive(query[None], keys[None], keys[None], scale, 0.98) for _ in range(2))
    assert [choice.kind for choice in first[1]] == ["near_best" if quick else "dense"]
    assert first[1] == second[1]
    assert torch.equal(first[0].out, second[0].out)
