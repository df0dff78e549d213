"""The pattern of each head, and how much of it, from what a sample of this call's queries attends to.

A budget of mass in place of fixed sizes: FlexPrefill (arXiv 2502.20766) and XAttention (2503.16428) found it better at
equal density. The exact attention of queries spread over the call is at hand, so that what a choice would leave out of
it is known, not modelled. Half of these queries say what to read; the budget must hold for the other half, which had no
say. Outputs go wrong where a query loses much, so the budget bounds the root mean square over queries of the mass left
out: its mean is small even if one query in fifty loses everything.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.kernels.sparse.coverage import Coverage, Layout, list_blocks, list_coverage
from retrieval_attn.kernels.sparse.lists import SparseIndex
from retrieval_attn.kernels.sparse.near_best import CHOOSING, DELTAS, Chooser, count_near_best, list_near_best
from retrieval_attn.kernels.sparse.patterns import best_blocks, score_blocks
from retrieval_attn.kernels.sparse.probes import CHECK, FIT, N_FIRST, N_NEAR, Seen, look

# Numbers of columns that are tried, most wanted first. Diagonals make up what is then missing.
COLUMNS = (0, 16, 64, 256, 512, 1024, 2048, 4096)

# A sparse head reads less than this share of the keys; reading more takes as long as dense attention.
DENSE_FROM = 0.4


class HeadChoice(NamedTuple):
    """How one head attends in one call: its pattern, the share of the visible keys that it reads ("dense": 1), and the
    root mean square over the probes of the mass that this leaves out."""

    kind: str
    density: float
    missing: float


class Offer(NamedTuple):
    """What a pattern needs to keep within the budget, by head.

    cost: (h,) keys that a query reads, beside those always read; infinite if the budget is out of reach. missing: (h,)
    root mean square of what is left out. n: (h,) how many diagonals or blocks, of `order` (h, any), best first; of
    "near_best", `order` (h, 1) is how far below. columns: (h, C) keys, S for none.
    """

    cost: Tensor
    missing: Tensor
    n: Tensor
    order: Tensor
    columns: Tensor


class Workspace(NamedTuple):
    """What calls for the heads of a group share. scratch: of `attend_probes`; choosers: gives one for each KV head."""

    scratch: Tensor | None = None
    choosers: Callable[[], Sequence[Chooser]] | None = None


NO_WORKSPACE = Workspace()


def choose(
    query: Tensor,
    keys: Tensor,
    scale: float,
    mass: float,
    layout: Layout,
    kinds: Sequence[str],
    workspace: Workspace = NO_WORKSPACE,
) -> tuple[list[HeadChoice], list[tuple[list[int], SparseIndex]]]:
    """The cheapest of `kinds` within the budget for each head, and the lists of those heads that are not dense.

    query: (h, T, D); keys: (g, S, D). mass: 1 minus the mass that may be left out, as a root mean square over probes.
    """
    seen, budget = look(query, keys, scale, layout, workspace.scratch), 1 - mass
    offers: dict[str, Offer] = {}
    if "a_shape" in kinds:
        offers["a_shape"] = offer_a_shape(seen, budget, layout)
    if "vertical_slash" in kinds:
        offers["vertical_slash"] = offer_vertical_slash(seen, budget, layout)
    if "block_sparse" in kinds:
        offers["block_sparse"] = offer_block_sparse(seen, budget, layout, score_blocks(query, keys, scale, layout))
    choosers = workspace.choosers or functools.cache(lambda: [Chooser(head, layout) for head in keys])
    if "near_best" in kinds:
        offers["near_best"] = offer_near_best(seen, budget, layout, query, choosers, scale)
    choices = _decide(offers, seen, layout)
    parts = []
    for kind, offer in offers.items():
        heads = [h for h, choice in enumerate(choices) if choice.kind == kind]
        if not heads:
            continue
        chosen = Offer(*(x[heads] for x in offer))
        if kind == "near_best":
            own = [choosers()[h * len(keys) // len(query)] for h in heads]
            index = list_near_best(query[heads], own, scale, chosen.order[:, 0].tolist(), layout)
        elif kind == "block_sparse":
            index = list_blocks(best_blocks(chosen.order, chosen.n, layout), layout)
        else:
            index = _list_diagonals(chosen, layout)
        parts.append((heads, index))
    return choices, parts


def _decide(offers: dict[str, Offer], seen: Seen, layout: Layout) -> list[HeadChoice]:
    """The cheapest offer of each head; dense, if that is too dear."""
    always = N_FIRST + (N_NEAR + 0.5) * layout.width
    cost, best = torch.stack([offer.cost for offer in offers.values()]).min(0)
    missing = torch.stack([offer.missing for offer in offers.values()]).gather(0, best[None])[0]
    kinds, choices = list(offers), []
    for i, n_keys, left in zip(best.tolist(), cost.tolist(), missing.tolist(), strict=True):
        share = (n_keys + always) / seen.visible
        read = share - CHOOSING if kinds[i] == "near_best" else share
        choices.append(HeadChoice(kinds[i], read, left) if share < DENSE_FROM else HeadChoice("dense", 1.0, 0.0))
    return choices


def offer_a_shape(seen: Seen, budget: float, layout: Layout) -> Offer:
    """The nearest diagonals, without a gap."""
    by_distance = _by_distance(seen.blocks, seen.own)
    nearest = torch.arange(by_distance.shape[2], device=by_distance.device).expand(len(by_distance), -1)
    offer = _take(by_distance, nearest, seen.missing, budget, layout)
    return _without(offer, 1 + N_NEAR, layout)


def offer_vertical_slash(seen: Seen, budget: float, layout: Layout) -> Offer:
    """Some columns, and the diagonals that they leave wanting; the cheapest of a few numbers of columns."""
    # Queries that miss more have more to say.
    says = torch.zeros_like(seen.missing)
    says[:, FIT] = seen.missing[:, FIT]
    wanted = (says[:, None] @ seen.probes)[:, 0]
    top = wanted.topk(min(COLUMNS[-1], layout.S), dim=1)
    taken = seen.probes.gather(2, top.indices[:, None].expand(-1, seen.probes.shape[1], -1))
    taken *= (top.values > 0)[:, None]
    at = torch.div(top.indices - layout.first_key, layout.width, rounding_mode="floor")[:, None].expand_as(taken)
    columns = torch.where(top.values > 0, top.indices, layout.S)
    blocks, missing, best, done = seen.blocks.clone(), seen.missing, None, 0
    for n in sorted({min(n, columns.shape[1]) for n in COLUMNS}):
        blocks.scatter_add_(2, at[:, :, done:n], -taken[:, :, done:n])
        missing = missing - taken[:, :, done:n].sum(2)
        by_distance = _by_distance(blocks, seen.own)
        order = torch.einsum("hn,hnd->hd", missing[:, FIT], by_distance[:, FIT]).argsort(dim=1, descending=True)
        offer = _take(by_distance, order, missing, budget, layout)
        offer = offer._replace(cost=offer.cost + n, columns=columns.where(_counted(columns, n), layout.S))
        best, done = offer if best is None else _cheaper(best, offer), n
    assert best is not None
    return best


def offer_block_sparse(seen: Seen, budget: float, layout: Layout, scores: Tensor) -> Offer:
    """As many blocks for every run, those whose mean key its mean query likes best; scores: (h, N, blocks)."""
    order = scores[:, seen.runs].argsort(dim=2, descending=True)
    offer = _take(seen.blocks.gather(2, order), None, seen.missing, budget, layout)
    return _without(offer, 2 + N_NEAR, layout)._replace(order=scores)


def offer_near_best(
    seen: Seen, budget: float, layout: Layout, query: Tensor, choosers: Callable[[], Sequence[Chooser]], scale: float
) -> Offer:
    """The keys that come near the best of a query, chosen for every run; what they are is not known before.

    choosers: makes them, if any head may come to want them.
    """
    # Half of those that check: they have no part in the choice, and the masks take time.
    probes, best = seen.probes[:, CHECK][:, ::2], seen.best[:, CHECK][:, ::2, None]
    unread = seen.missing[:, CHECK][:, ::2]
    missing, deltas = probes.new_full(probes.shape[:1], torch.inf), torch.full(probes.shape[:1], DELTAS[-1])
    read = torch.full_like(missing, torch.inf)
    for delta in DELTAS:
        wanting = missing > budget
        if not wanting.any():
            break
        kept = probes >= best * math.exp(-delta)
        left = (unread - (probes * kept).sum(2)).clamp_min(0).square().mean(1).sqrt()
        missing, deltas = torch.where(wanting, left, missing), torch.where(wanting, delta, deltas)
        # A run reads what any of its queries wants: at least what these few do.
        read = torch.where(wanting, kept.any(1).sum(1), read)
    within = (missing <= budget) & (read < DENSE_FROM * seen.visible)
    if within.any():
        read = torch.maximum(read, count_near_best(query, choosers(), scale, deltas.tolist(), layout))
    cost = torch.where(within, read + CHOOSING * seen.visible, torch.inf)
    none = torch.zeros_like(deltas, dtype=torch.long)
    return Offer(cost, missing, none, deltas[:, None], none.new_empty((len(none), 0)))


def _by_distance(blocks: Tensor, own: Tensor) -> Tensor:
    """(h, n, distances) from (h, n, blocks), of probes in blocks `own`: distance 0 is their own block."""
    at = own[:, None] - torch.arange(blocks.shape[2], device=blocks.device)
    found = blocks.gather(2, at.clamp_min(0).expand(len(blocks), -1, -1))
    return found * (at >= 0)


def _take(parts: Tensor, order: Tensor | None, missing: Tensor, budget: float, layout: Layout) -> Offer:
    """As many parts (h, n, any), in order, as bring the mass that is missing (h, n) within the budget."""
    parts, missing = parts[:, CHECK], missing[:, CHECK]
    if order is not None:
        parts = parts.gather(2, order[:, None].expand_as(parts))
    left = torch.cat([missing[..., None], missing[..., None] - parts.cumsum(2)], dim=2)
    left = left.clamp_min_(0).square_().mean(1).sqrt_()  # [h, any + 1]
    within = left <= budget
    n = torch.where(within.any(1), within.float().argmax(1), left.shape[1] - 1)
    cost = torch.where(within.any(1), (n * layout.width).float(), torch.inf)
    none = n.new_empty((len(n), 0))
    return Offer(cost, left.gather(1, n[:, None])[:, 0], n, none if order is None else order, none)


def _without(offer: Offer, n_always: int, layout: Layout) -> Offer:
    """The offer, without the cost of diagonals or blocks that are read in any case and stand first in its order."""
    return offer._replace(cost=(offer.cost - n_always * layout.width).clamp_min(0))


def _counted(x: Tensor, n: Tensor | int) -> Tensor:
    """True in the first n places of each row of x (h, any)."""
    limit = n[:, None] if isinstance(n, Tensor) else n
    return (torch.arange(x.shape[1], device=x.device) < limit).expand_as(x)


def _cheaper(first: Offer, second: Offer) -> Offer:
    """The cheaper of two, head by head."""
    wins = second.cost < first.cost
    return Offer(
        *(torch.where(wins if a.ndim == 1 else wins[:, None], b, a) for a, b in zip(first, second, strict=True))
    )


def _list_diagonals(offer: Offer, layout: Layout) -> SparseIndex:
    """The diagonals and columns of an offer, and those always read."""
    diagonals = torch.zeros((len(offer.n), layout.n_blocks), dtype=torch.bool, device=offer.n.device)
    chosen = _counted(offer.order, offer.n)
    diagonals.scatter_(1, offer.order, chosen)
    diagonals[:, : 1 + N_NEAR] = True
    first = torch.arange(min(N_FIRST, layout.S), device=offer.n.device).expand(len(offer.n), -1)
    return list_coverage(Coverage(diagonals, torch.cat([first, offer.columns], dim=1)), layout)
