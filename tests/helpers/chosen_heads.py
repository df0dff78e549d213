"""Heads made for one pattern each, and what a choice leaves out."""

import torch

from retrieval_attn.kernels import reference

T, S, D = 512, 1500, 32


def noise(*shape):
    return 0.1 * torch.randn(*shape)


def single_needles(query, keys):
    """Every query wants a key of its own."""
    keys += 8 * torch.randn(S, D)
    query += keys[torch.randint(100, S - T, (T,))]


def made(plant, n_keys=S):
    query, keys = noise(T, D), noise(n_keys, D)
    plant(query, keys)
    return query[None], keys[None], D**-0.5


def left_out(index, query, keys, scale):
    """(h, T) mass of the exact softmax that the index does not list."""
    scores = (query @ keys.repeat_interleave(len(query) // len(keys), 0).mT) * scale
    weights = scores.masked_fill(
        torch.ones(scores.shape[1:], dtype=torch.bool).triu(keys.shape[1] - T + 1), -torch.inf
    ).softmax(-1)
    listed = reference.listed_keys(index, keys.shape[1])[0].repeat_interleave(index.rows, 1)[:, :T]
    return (weights * ~listed).sum(-1)
