"""Estimates attention over all far keys from the few that an index found.

An index selects; an estimator decides what the selected keys stand for: themselves ("topk"), a weighted sample of all
keys ("lift"), or themselves beside an estimate of the rest ("tail").
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.index import SearchResult
from retrieval_attn.index.lift import Lift
from retrieval_attn.kernels import AttentionState, TailSummary, attend_far, merge
from retrieval_attn.kernels.merge import share_of_scores, shares_read

# Two ways of summing an inner product differ by less than this part of the largest score: a threshold is lowered by it,
# so that the key that sets it is not left out.
ROUNDING = 1e-5


class FarState(NamedTuple):
    """Attention over the far keys of one layer.

    state: over all of them, by estimate. n_used: (H, T) keys that each query head asked for and used. recovered:
    (H, T), of the mass in `state`, the share of the keys that were read; for "lift" by the sample's own weights.
    """

    state: AttentionState
    n_used: Array
    recovered: Tensor


def estimate_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hits: SearchResult,
    scale: float,
    *,
    estimator: str = "topk",
    tail: TailSummary | None = None,
    lift: Lift | None = None,
    share_group: bool = True,
) -> FarState:
    """Attention over all far keys from what a search found.

    query: (1, H, T, D); keys (G, S, D), values (G, S, Dv), in CPU memory. hits: of a search for (H, T, D) queries.
    estimator: "topk"; "tail", which needs the `tail` of these keys and values; or "lift", which needs hits of an index
    that was built with `lift`, one key more than are to be used. share_group: as in `attend_far`; a sample ("lift") is
    never shared. Where the hits are all keys, each is exact.
    """
    if estimator == "lift":
        assert lift is not None
        return _sampled(query, keys, values, hits, scale, lift)
    n_found = np.sum(hits.ids >= 0, axis=-1)
    if estimator == "topk":
        found = attend_far(query, keys, values, hits.ids, scale, share_group=share_group)
        return FarState(found, n_found, torch.ones(n_found.shape))
    assert tail is not None
    threshold = worst_scores(hits, scale, n_found)
    found = attend_far(query, keys, values, hits.ids, scale, share_group=share_group, threshold=threshold)
    rest = tail.attend_rest(query, torch.from_numpy(threshold), torch.from_numpy(n_found), scale)
    whole = merge(found, rest)
    return FarState(whole, n_found, found.share_of(whole)[0])


def worst_scores(hits: SearchResult, scale: float, n_found: Array) -> Array:
    """Scaled scores (H, T) below which nothing was found: the worst ones found, or +inf where nothing was."""
    last = np.take_along_axis(hits.scores, np.maximum(n_found - 1, 0)[..., None], axis=-1)[..., 0] * scale
    slack = ROUNDING * np.maximum(np.abs(hits.scores[..., 0] * scale), 1)
    return np.where(n_found > 0, last - slack, np.inf).astype(np.float32)


def _sampled(query: Tensor, keys: Tensor, values: Tensor, hits: SearchResult, scale: float, lift: Lift) -> FarState:
    """A priority sample: each key with the weight max(w, tau), where ln tau is the best priority left out."""
    complete = hits.ids.shape[-1] >= keys.shape[1]
    ids = hits.ids if complete else hits.ids[..., :-1]
    # The best priority left out; where fewer were found, the padding's score, -inf.
    left_out = np.full(ids.shape[:-1], -np.inf) if complete else hits.scores[..., -1]
    threshold = (left_out * scale).astype(np.float32)
    found = attend_far(query, keys, values, ids, scale, share_group=False, threshold=threshold, below="raise")
    R = ids.shape[0] // len(keys)
    bonus = lift.bonuses(keys.shape[1])
    group = np.arange(ids.shape[0])[:, None, None] // R
    scores = np.where(ids >= 0, (hits.scores[..., : ids.shape[-1]] - bonus[group, ids]) * scale, -np.inf)
    # The sample's estimate of the whole may be smaller than what it holds.
    recovered = share_of_scores(torch.from_numpy(scores), found).clamp_max(1)
    return FarState(found, np.sum(ids >= 0, axis=-1), recovered)


def within_mass(
    hits: SearchResult,
    scale: float,
    rest: AttentionState,
    anyway: Sequence[AttentionState],
    mass: float,
    least: int,
) -> tuple[SearchResult, bool]:
    """The fewest best hits of each head, but at least `least`, that recover `mass` of all attention.

    rest: the estimated tail below the hits. anyway: what is read beside them. Returns the hits, the others replaced by
    -1, and whether they suffice.
    """
    scores = torch.from_numpy(np.where(hits.ids >= 0, hits.scores * scale, -np.inf))
    enough = shares_read(scores, anyway, rest) >= mass
    n_kept = torch.where(enough.any(-1), enough.int().argmax(-1) + 1, scores.shape[-1]).clamp_min(least)
    dropped = np.arange(scores.shape[-1]) >= n_kept.numpy()[..., None]
    kept = hits._replace(ids=np.where(dropped, -1, hits.ids), scores=np.where(dropped, -np.inf, hits.scores))
    return kept, bool(enough.any(-1).all())
