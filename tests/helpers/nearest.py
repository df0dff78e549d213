"""Queries and keys for exact nearest keys."""

import torch

from retrieval_attn.kernels import reference


def off_distribution(H=4, G=2, T=9, S=300, D=64, dtype=torch.float32):
    """Queries away from the keys, whose few best keys are far better than the rest."""
    keys = torch.randn(G, S, D) + 2 * torch.randn(D)
    needles = torch.randint(0, S, (H, T))
    chosen = keys.repeat_interleave(H // G, 0).gather(1, needles[..., None].expand(-1, -1, D))
    return (chosen + 3 * torch.randn(H, T, D) + 1).to(dtype), keys.to(dtype)


def with_ties(H=4, G=2, T=9, S=300, D=64, dtype=torch.float32):
    """Small whole numbers: every score is exact in every dtype, and few scores differ."""
    queries, keys = torch.randint(-1, 2, (H, T, D)), torch.randint(-1, 2, (G, S, D))
    # The first query of each head scores 0 with every key, some of it -0.
    queries[:, 0] = 0
    return queries.to(dtype), keys.to(dtype)


def assert_exact(found, queries, keys, k):
    """The very ids and scores of the definition."""
    true = reference.nearest_keys(queries, keys, k)
    assert found.ids.dtype == torch.int32
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.ids, true.ids)
    assert torch.equal(found.scores, true.scores)


def assert_best(found, queries, keys, k):
    """The k best up to what the order of a float32 sum may change: half a score's last bits for each of D terms."""
    true = reference.nearest_keys(queries.double(), keys.double(), k)
    filled = true.ids >= 0
    assert found.ids.shape == found.scores.shape == true.ids.shape
    assert torch.equal(found.ids >= 0, filled)
    assert torch.equal(found.scores > -torch.inf, filled)
    plain = reference.nearest_keys(queries.float(), keys.float(), k).scores.double()
    rounding = 2 * (plain - true.scores)[filled].abs().max()
    rounding += 4 * torch.finfo(torch.float32).eps * true.scores[filled].abs().max()
    assert (found.scores.double() - true.scores)[filled].abs().max() <= rounding
    all_scores = queries.double() @ keys.double().repeat_interleave(len(queries) // len(keys), 0).mT
    of_ids = all_scores.gather(2, found.ids.long().clamp_min(0))
    assert (of_ids - true.scores)[filled].abs().max() <= rounding
    for row in found.ids.flatten(0, 1):
        assert row[row >= 0].unique().numel() == (row >= 0).sum()
