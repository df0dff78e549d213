"""Attention over a subset of the keys, and how two subsets become one.

Softmax attention over disjoint sets of keys can be combined exactly from each set's output and the logarithm of its
softmax denominator (Rabe and Staats 2021, arXiv 2112.05682). Once an `lse` is made only `merge` computes with it,
here, in its Triton twin (gpu/merge.py) and in its definition (reference.py); others join states by `merge` and
`AttentionState.beside`, and ask for shares of the mass.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("retrieval_attn")


class AttentionState(NamedTuple):
    """Attention over a subset of keys, in a form that merges.

    out: (B, H, T, D), weighted mean of the subset's values; zero if it is empty.
    lse: (B, H, T) float32, natural log of the softmax denominator over scaled scores; -inf if it is empty.
    """

    out: Tensor
    lse: Tensor

    def to(self, device: torch.device | str) -> "AttentionState":
        return AttentionState(self.out.to(device), self.lse.to(device))

    def share_of(self, whole: "AttentionState") -> Tensor:
        """The share of the mass of `whole` that these keys hold, (B, H, T) float32 on this state's device.

        whole: over all keys of this state and others. No keys hold a share of 0; rounding may take it just above 1.
        """
        return torch.exp(self.lse - whole.lse.to(self.lse.device)).masked_fill(self.lse == -torch.inf, 0)

    def with_sinks(self, sinks: Tensor) -> "AttentionState":
        """Beside one more key per head that has no value, as gpt-oss learns it: it only takes a share of the mass.

        sinks: (H,), the scaled score of that key.
        """
        lse = sinks.detach().float().to(self.lse.device)[None, :, None].expand_as(self.lse)
        return merge(self, AttentionState(torch.zeros_like(self.out), lse.contiguous()))

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "AttentionState":
        """The state of no keys at all, the identity of `merge`. shape: that of `out`, (B, H, T, D)."""
        lse = torch.full(shape[:-1], -torch.inf, dtype=torch.float32, device=device)
        return cls(torch.zeros(shape, dtype=dtype, device=device), lse)

    @classmethod
    def beside(cls, states: Sequence["AttentionState"], dim: int) -> "AttentionState":
        """Of other sequences (dim 0), heads (1) or queries (2), one behind the other."""
        return cls(torch.cat([state.out for state in states], dim), torch.cat([state.lse for state in states], dim))


def merge(first: AttentionState, *others: AttentionState) -> AttentionState:
    """Attention over the union of disjoint subsets of keys.

    first, others: states of one shape on one device; their dtypes may differ.
    Computed in float32; `out` keeps the dtype of the first. A side that is empty changes nothing: the other comes back
    unrounded; all sides empty give the empty state. Commutes and associates within rounding, for any gap between the
    `lse`. Leaves its arguments unchanged; may return one of them. Raises ValueError for other shapes or devices.
    """
    _check(first)
    out, lse = first
    for i, other in enumerate(others, start=1):
        _check(other)
        _check_pair(first, other)
        # Rounded once, at the end.
        dtype = first.out.dtype if i == len(others) else torch.float32
        out, lse = _merge_pair(out, lse, *other, dtype)
    return AttentionState(out, lse)


def _merge_pair(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if out.device.type == "cuda" and out.numel() and has_triton(out.device):
        from retrieval_attn.kernels.gpu.merge import merge_pair

        return merge_pair(out, lse, other_out, other_lse, dtype)
    # Both weights are at most 1: the larger lse is subtracted inside sigmoid and logaddexp.
    # Two empty sides differ by NaN; their outputs are both zero, so any weight will do.
    share = torch.sigmoid(other_lse - lse).nan_to_num_()
    out = torch.lerp(out.float(), other_out.float(), share[..., None])
    return out.to(dtype), torch.logaddexp(lse, other_lse)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on this CUDA device; if not, says so once."""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"Triton wants compute capability 8.0, which {torch.cuda.get_device_name(device)} has not"
    else:
        return True
    log.warning("no Triton kernel runs here: prefill is dense and the rest plain PyTorch, which is slower: %s", reason)
    return False


def attend(scores: Tensor, values: Tensor) -> AttentionState:
    """The state of `values` under the softmax of `scores`, for code that has the scores at hand.

    scores: (..., T, S), scaled, -inf where a query does not attend; values: (..., S, D), both of one wide dtype.
    A row that attends to nothing, or S = 0, is empty.
    """
    if scores.shape[-1] == 0:
        return AttentionState.empty((*scores.shape[:-1], values.shape[-1]), values.dtype, values.device)
    # The lowest number in place of -inf: exp(-inf - lowest) is 0 where exp(-inf - -inf) would be NaN.
    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    # A row that attends has total >= 1. Dividing last is exact to the last bits; exp(scores - lse) would round by lse.
    return AttentionState(weights @ values / total.clamp_min(1), (top + total.log())[..., 0])


def share_of_scores(scores: Tensor, whole: AttentionState) -> Tensor:
    """The share of the mass of `whole` (1, H, T) that keys of these scaled scores (H, T, K) hold: (H, T)."""
    return torch.exp(scores.logsumexp(-1) - whole.lse[0])


def shares_read(scores: Tensor, anyway: Sequence[AttentionState], rest: AttentionState) -> Tensor:
    """The share of all mass that is read with the first 1, 2, ... K of some keys: (H, T, K) float64, in CPU memory.

    scores: (H, T, K), scaled, of these keys. anyway: states (1, H, T) of what is read in any case; rest: of what is
    never read. All are disjoint.
    """
    parts = [state.lse[0].cpu().double() for state in anyway]
    close = functools.reduce(torch.logaddexp, parts)
    wide = scores.double()
    total = torch.logaddexp(torch.logaddexp(wide.logsumexp(-1), close), rest.lse[0].double())
    return torch.exp(torch.logaddexp(wide.logcumsumexp(-1), close[..., None]) - total[..., None])


def _check(state: AttentionState) -> None:
    out, lse = state
    if out.shape[:-1] != lse.shape:
        raise ValueError(
            f"lse must have the shape of out but its last axis, got {tuple(lse.shape)} for {tuple(out.shape)}"
        )


def _check_pair(first: AttentionState, other: AttentionState) -> None:
    if first.out.shape != other.out.shape:
        raise ValueError(
            f"states to merge must share a shape, got {tuple(first.out.shape)} and {tuple(other.out.shape)}"
        )
    if first.out.device != other.out.device or first.lse.device != other.lse.device:
        raise ValueError(f"states to merge must be on one device, got {first.out.device} and {other.out.device}")
