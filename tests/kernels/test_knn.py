import inspect
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import assert_best, assert_exact, off_distribution, with_ties

from retrieval_attn.kernels import knn, nearest_keys, reference
from retrieval_attn.kernels.knn import EMPTY, pack, unpack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 63, 1000])
@pytest.mark.parametrize("k", [1, 100])
def test_lengths(dtype, S, k):
    for inputs in (off_distribution(S=S, dtype=dtype), with_ties(S=S, dtype=dtype)):
        assert_best(nearest_keys(*inputs, k), *inputs, k)
    assert_exact(nearest_keys(*inputs, k), *inputs, k)


@pytest.mark.parametrize("D", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 1), (14, 2), (6, 6)])
def test_head_dimensions_and_groups(D, H, G):
    inputs = off_distribution(H, G, D=D)
    assert_best(nearest_keys(*inputs, 20), *inputs, 20)


@given(st.integers(1, 5), st.integers(1, 200), st.integers(1, 250), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_tiles_of_any_size_give_the_whole(T, S, k, tile, seed):
    torch.manual_seed(seed)
    inputs = with_ties(T=T, S=S, D=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "KEYS", tile)
        patch.setattr(knn, "ROWS", 4)
        assert_exact(nearest_keys(*inputs, k), *inputs, k)


@pytest.mark.parametrize("rising", [False, True])
def test_keys_in_order_of_score(rising):
    """Every tile improves on all before, or none does."""
    keys = torch.arange(1.0, 20_001) if rising else torch.arange(20_000.0, 0, -1)
    inputs = torch.tensor([[[1.0], [-1.0]]]), keys[None, :, None]
    assert_exact(nearest_keys(*inputs, 50), *inputs, 50)


def test_dtypes_may_differ():
    queries, keys = off_distribution()
    for dtype, other in itertools.permutations(DTYPES, 2):
        inputs = queries.to(dtype), keys.to(other)
        assert_best(nearest_keys(*inputs, 30), *inputs, 30)


def test_strided_inputs_unchanged():
    queries, keys = off_distribution()
    inputs = queries.transpose(0, 1).contiguous().transpose(0, 1), keys.mT.contiguous().mT
    before = [x.clone() for x in inputs]
    assert_best(nearest_keys(*inputs, 30), *inputs, 30)
    assert all(torch.equal(x, y) for x, y in zip(before, inputs, strict=True))


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_no_keys_or_no_queries(T, S):
    found = nearest_keys(torch.zeros(4, T, 8), torch.zeros(2, S, 8), 3)
    assert found.ids.shape == found.scores.shape == (4, T, 3)
    assert (found.ids == -1).all()
    assert (found.scores == -torch.inf).all()


def test_packed_numbers_sort_by_score_then_lower_id():
    scores = torch.tensor([torch.inf, 3e38, 1, 1, 1e-40, 0.0, -0.0, 0.0, -1e-40, -1, -3e38, -torch.inf])
    ids = torch.tensor([9, 2, 3, 2**31 - 1, 0, 0, 1, 2, 5, 4, 0, -1], dtype=torch.int32)
    packed = pack(scores, ids)
    assert torch.equal(packed, packed.sort(descending=True).values)
    assert packed.unique().numel() == packed.numel()
    back = unpack(packed)
    assert torch.equal(back.scores, scores)
    assert torch.equal(back.ids, ids)
    assert packed[-1] == EMPTY


def test_never_writes_out_all_scores(monkeypatch):
    sizes, improve = [], knn._improve

    def noted(best, scores, start):
        sizes.append(scores.numel())
        improve(best, scores, start)

    monkeypatch.setattr(knn, "_improve", noted)
    nearest_keys(torch.randn(2, 300, 4), torch.randn(1, 20_000, 4), 10)
    assert sum(sizes) == 600 * 20_000
    assert max(sizes) <= knn.ROWS * knn.KEYS


def test_scores_of_minus_infinity_are_absent():
    queries, keys = torch.ones(2, 3, 64), with_ties(2, 2, S=20)[1]
    keys[0, 7:], keys[1, 2] = -torch.inf, -torch.inf
    assert_exact(nearest_keys(queries, keys, 20), queries, keys, 20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_names_the_head_that_holds_nan(bad):
    queries, keys = off_distribution()
    queries[2, 3, 5] = bad
    with pytest.raises(ValueError, match="scores of head 2 must be finite"):
        nearest_keys(queries, keys, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"queries": torch.zeros(4, 8)}, r"must be \(H, T, D\) and \(G, S, D\), got \(4, 8\) and \(2, 5, 8\)"),
        ({"keys": torch.zeros(2, 5, 7)}, r"must be \(H, T, D\) and \(G, S, D\)"),
        ({"keys": torch.zeros(3, 5, 8)}, "heads H a multiple of G"),
        ({"keys": torch.zeros(2, 5, 8).double()}, "float16, bfloat16 or float32, got float32 and float64"),
        ({"keys": torch.zeros(2, 5, 8, device="meta")}, "one device, got cpu and meta"),
    ],
)
def test_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        nearest_keys(**{"queries": torch.zeros(4, 3, 8), "keys": torch.zeros(2, 5, 8), "k": 3} | change)


def test_has_the_signature_of_its_definition():
    fast, slow = (inspect.signature(f).parameters for f in (nearest_keys, reference.nearest_keys))
    assert list(fast) == list(slow)


def test_says_once_what_has_no_kernel(monkeypatch, caplog):
    monkeypatch.setattr(knn, "has_triton", lambda device: True)
    knn._is_fused.cache_clear()
    device = torch.device("cuda")
    with caplog.at_level(logging.WARNING, "retrieval_attn"):
        assert all(knn._is_fused(device, D, k) for D in knn.HEAD_DIMS for k in (1, knn.MOST_FUSED))
        assert not caplog.records
        for _ in range(2):
            assert not knn._is_fused(device, 80, 100)
        assert [r.getMessage() for r in caplog.records] == [
            "exact kNN runs in plain PyTorch, which is slower: its kernel wants dimension 64, 96, 128, 256 and "
            "k <= 896, got 80 and 100"
        ]
        assert not knn._is_fused(device, 64, knn.MOST_FUSED + 1)
    knn._is_fused.cache_clear()
