"""How the next token is chosen."""

import pytest
import torch

from retrieval_attn.config import Sampling
from retrieval_attn.generate import Sampler

CPU = torch.device("cpu")

# Of four tokens, not in order.
SHARES = torch.tensor([0.05, 0.5, 0.15, 0.3])


def drawn(n=300, **options):
    """The tokens that come in n draws."""
    sample = Sampler(Sampling(**({"temperature": 1.0, "seed": 1} | options)), CPU)
    return [sample(SHARES.log()[None]) for _ in range(n)]


@pytest.mark.parametrize(("top_k", "tokens"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (0, {0, 1, 2, 3})])
def test_top_k_leaves_the_likeliest(top_k, tokens):
    assert set(drawn(top_k=top_k)) == tokens


@pytest.mark.parametrize(("top_p", "tokens"), [(0.4, {1}), (0.75, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_leaves_the_fewest_that_hold_the_share(top_p, tokens):
    assert set(drawn(top_p=top_p)) == tokens


def test_both_filters_hold_and_the_temperature_comes_first():
    assert set(drawn(top_k=3, top_p=0.75)) == {1, 3}
    assert set(drawn(top_k=2, top_p=0.99)) == {1, 3}
    # At 0.5 the likeliest has 0.68 of the mass.
    assert set(drawn(top_p=0.65, temperature=0.5)) == {1}
    assert set(drawn(top_p=0.65)) == {1, 3}


def test_what_is_left_is_drawn_by_its_share():
    tokens = drawn(n=2000, top_k=2)
    assert tokens.count(1) / len(tokens) == pytest.approx(0.5 / 0.8, abs=0.04)


def test_without_temperature_the_likeliest_is_taken():
    assert set(drawn(n=5, temperature=0.0, top_k=3, top_p=0.9)) == {1}


def test_logits_that_are_no_numbers_are_named():
    sample = Sampler(Sampling(), CPU)
    with pytest.raises(ValueError, match="the model's logits hold NaN"):
        sample(torch.tensor([[1.0, float("nan")]]))
