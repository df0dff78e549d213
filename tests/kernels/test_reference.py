import inspect
import math

import numpy as np
import pytest
import torch

from retrieval_attn import kernels
from retrieval_attn.kernels import AttentionState, reference


@pytest.mark.parametrize("name", ["merge", "attend_near", "attend_far", "attend_dense"])
def test_has_the_signature_of_the_fast_one(name):
    fast, slow = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (kernels, reference))
    assert [(p.name, p.kind, p.default) for p in fast] == [(p.name, p.kind, p.default) for p in slow]


def test_two_keys_by_hand():
    query = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    keys = torch.tensor([[[[2.0, 0.0], [0.0, 4.0]]]])
    values = torch.tensor([[[[1.0], [3.0]]]])
    state = reference.attend_near(query, keys, values, 0.5)
    e, e2 = math.e, math.e**2
    torch.testing.assert_close(state.lse, torch.tensor([[[math.log(e + 1)], [math.log(1 + e2)]]]))
    out = torch.tensor([[[[(e + 3) / (e + 1)]], [[(1 + 3 * e2) / (1 + e2)]]]])
    torch.testing.assert_close(state.out, out)


def test_heads_of_a_group_lie_side_by_side():
    query, keys = torch.ones(1, 4, 1, 1), torch.zeros(1, 2, 1, 1)
    values = torch.tensor([7.0, 9.0]).view(1, 2, 1, 1)
    assert reference.attend_near(query, keys, values, 1.0).out.flatten().tolist() == [7, 7, 9, 9]


def test_is_sdpa_in_float64():
    query, (keys, values) = torch.randn(1, 4, 30, 16).double(), torch.randn(2, 1, 2, 30, 16).double()
    for causal in (False, True):
        sdpa = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(reference.attend_dense(query, keys, values, 0.25, causal).out, sdpa)


def test_causal_is_aligned_to_the_last_key():
    query, keys = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 5, 1)
    lse = reference.attend_dense(query, keys, keys, 1.0, causal=True).lse
    torch.testing.assert_close(lse, torch.tensor([[[math.log(4), math.log(5)]]]))


def test_far_is_near_over_the_named_keys():
    query, keys, values = torch.randn(1, 2, 1, 8), torch.randn(1, 50, 8), torch.randn(1, 50, 8)
    ids = np.array([[[3, 41, -1]], [[41, 7, 7]]], np.int32)
    for share, sets in ((True, ([3, 7, 41], [3, 7, 41])), (False, ([3, 41], [7, 41]))):
        far = reference.attend_far(query, keys, values, ids, 0.3, share_group=share)
        for head, chosen in enumerate(sets):
            near = reference.attend_near(query[:, [head]], keys[None, :, chosen], values[None, :, chosen], 0.3)
            torch.testing.assert_close(far.out[:, [head]], near.out)
            torch.testing.assert_close(far.lse[:, [head]], near.lse)


def test_merge_by_hand():
    a = AttentionState(torch.tensor([[[[1.0]]]]), torch.tensor([[[math.log(3)]]]))
    b = AttentionState(torch.tensor([[[[5.0]]]]), torch.tensor([[[math.log(1)]]]))
    merged = reference.merge(a, b)
    torch.testing.assert_close(merged.out, torch.tensor([[[[2.0]]]]))
    torch.testing.assert_close(merged.lse, torch.tensor([[[math.log(4)]]]))
    assert reference.merge(AttentionState.empty((1, 1, 1, 1)), AttentionState.empty((1, 1, 1, 1))).lse == -math.inf
