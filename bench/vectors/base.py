"""What every source of benchmark vectors returns, and what is said about the keys of a head."""

from typing import NamedTuple

import torch
from torch import Tensor

# Keys that the mean and covariance of a head are estimated from.
_SPREAD_KEYS = 8192


class Vectors(NamedTuple):
    """One layer's vectors, after rotary encoding, of one dtype.

    keys, values: (G, S, D), the far ones. prefill_queries: (H, T, D), asked at positions spread over the context.
    queries: (H, T', D), held out: asked after the context. Query head h reads KV head h // (H // G).
    runs: (T',) int64, which stretch of text a held-out query belongs to; those of one stretch are consecutive decode
    steps, in order.
    """

    keys: Tensor
    prefill_queries: Tensor
    queries: Tensor
    values: Tensor
    runs: Tensor


class Spread(NamedTuple):
    """Mean and covariance of a head's keys, as eigenvalues (ascending) and eigenvectors; `own` is the keys' mean
    Mahalanobis distance."""

    mean: Tensor
    values: Tensor
    axes: Tensor
    own: float

    @classmethod
    def of(cls, keys: Tensor) -> "Spread":
        """keys: (S, D) float32; an even sample of them is looked at."""
        some = keys[:: max(1, len(keys) // _SPREAD_KEYS)]
        mean = some.mean(0)
        covariance = torch.cov(some.T, correction=0).reshape(keys.shape[1], keys.shape[1])
        # Directions in which keys do not vary at all would make every query infinitely far.
        floor = 1e-4 * covariance.diagonal().mean() + 1e-6
        values, axes = torch.linalg.eigh(covariance + floor * torch.eye(keys.shape[1]))
        bare = cls(mean, values, axes, 1.0)
        return bare._replace(own=float(bare.distance(some).mean()))

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance of the rows of x from the keys."""
        return self.whitened(x).norm(dim=1)

    def whitened(self, x: Tensor) -> Tensor:
        """The rows of x in units of the keys' standard deviations, from their mean."""
        return (x - self.mean) @ self.axes / self.values.sqrt()

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the covariance's spectrum."""
        share = self.values / self.values.sum()
        return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def check_shape(S: int, H: int, G: int, D: int, n_prefill: int, n_heldout: int) -> None:
    """Raise ValueError for shapes that no attention layer has."""
    if min(S, H, G, D, n_prefill, n_heldout) < 1:
        raise ValueError(
            f"S, H, G, D, n_prefill and n_heldout must be at least 1, got {S}, {H}, {G}, {D}, {n_prefill}, {n_heldout}"
        )
    if H % G:
        raise ValueError(f"H must be a multiple of G ({G}), got {H}")
    if D % 16:
        raise ValueError(f"D must be a multiple of 16, got {D}")
