"""Vectors that break careless indexes. Each is a variation of `shaped`, except where that would spoil its point."""

from collections.abc import Callable

import torch
from torch import Tensor

from retrieval_attn.bench.vectors.base import Vectors, check_shape
from retrieval_attn.bench.vectors.shaped import shaped

# Norm of the one giant key, as a multiple of the keys' mean norm.
GIANT = 100.0

COPIES = 64

# Standard deviation of the logits of nearly uniform attention.
FLAT = 0.1


def adversarial(
    source: str, S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype
) -> Vectors:
    """Vectors of one of the sources named in `ADVERSARIAL`; arguments as for `shaped`."""
    check_shape(S, H, G, D, n_prefill, n_heldout)
    return ADVERSARIAL[source](S, H, G, D, n_prefill, n_heldout, seed, dtype)


def _uniform(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype) -> Vectors:
    """Every key has nearly the same weight: the best 100 are no better than any others, and hold next to nothing."""
    make = torch.Generator().manual_seed(seed)
    keys, values = _normal(make, dtype, G, S, D), _normal(make, dtype, G, S, D)
    asked, heldout = (_normal(make, dtype, H, n, D) * FLAT for n in (n_prefill, n_heldout))
    return Vectors(keys, asked, heldout, values, torch.arange(n_heldout))


def _giant(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype) -> Vectors:
    """One key is a hundred times longer than the others, in a direction that half of the queries dislike."""
    base = shaped(S, H, G, D, n_prefill, n_heldout, seed, dtype)
    make = torch.Generator().manual_seed(seed + 1)
    for g in range(G):
        keys = base.keys[g]
        direction = torch.randn(D, generator=make)
        at = int(torch.randint(S, (1,), generator=make))
        keys[at] = (direction * (GIANT * float(keys.float().norm(dim=1).mean()) / direction.norm())).to(dtype)
    return base


def _duplicates(
    S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype
) -> Vectors:
    """Every key is there 64 times, scattered; values differ. Half of the best keys are told apart by chance alone."""
    base = shaped(S, H, G, D, n_prefill, n_heldout, seed, dtype)
    make = torch.Generator().manual_seed(seed + 1)
    originals = torch.randint(S, (max(1, S // COPIES),), generator=make)
    # Each original as often as any other, then in random order.
    which = originals[torch.arange(S) % len(originals)][torch.randperm(S, generator=make)]
    for g in range(G):
        base.keys[g] = base.keys[g][which]
    return base


def _zeros(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype) -> Vectors:
    """All keys are zero: every key is as good as any other, exactly."""
    base = _uniform(S, H, G, D, n_prefill, n_heldout, seed, dtype)
    base.keys.zero_()
    return base


def _self(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype) -> Vectors:
    """Queries are keys of their head, to the bit: no gap between the distributions, which an index must not need."""
    base = shaped(S, H, G, D, n_prefill, n_heldout, seed, dtype)
    make = torch.Generator().manual_seed(seed + 1)
    for h in range(H):
        keys = base.keys[h // (H // G)]
        base.prefill_queries[h] = keys[torch.randint(S, (n_prefill,), generator=make)]
        base.queries[h] = keys[torch.randint(S, (n_heldout,), generator=make)]
    return base._replace(runs=torch.arange(n_heldout))


def _drift(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int, seed: int, dtype: torch.dtype) -> Vectors:
    """What is asked late is unlike anything asked while the prompt was read: see `shaped`."""
    return shaped(S, H, G, D, n_prefill, n_heldout, seed, dtype, drift=True)


def _normal(make: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    for part in out:
        part.copy_(torch.randn(part.shape, generator=make))
    return out


ADVERSARIAL: dict[str, Callable[[int, int, int, int, int, int, int, torch.dtype], Vectors]] = {
    "uniform": _uniform,
    "giant": _giant,
    "duplicates": _duplicates,
    "zeros": _zeros,
    "self": _self,
    "drift": _drift,
}
