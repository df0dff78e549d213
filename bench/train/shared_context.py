"""Attention of many rows of questions over one document that they share, with its exact gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Context(NamedTuple):
    """A document that ran forward already: what each layer got as input, (1, N, hidden) each, detached."""

    inputs: list[Tensor]

    @property
    def n_tokens(self) -> int:
        return self.inputs[0].shape[1]


class ShareAttention(torch.autograd.Function):
    """Attention of B rows of T queries over N shared keys and, causally, over the row's own T keys.

    The two parts run through the CPU flash kernel apart and merge by their log-sum-exp. Given the merged output and
    log-sum-exp, the kernel's backward of either part is the exact gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        folded = fold_queries(q, shared_k.shape[1])
        far, far_lse = flash(folded, shared_k, shared_v)
        near, near_lse = flash(q, k, v, 0.0, True)
        far, far_lse = unfold_queries(far, q), unfold_queries(far_lse[..., None], q)[..., 0]
        lse = torch.logaddexp(far_lse, near_lse)
        out = far * (far_lse - lse).exp()[..., None] + near * (near_lse - lse).exp()[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, shared_k, shared_v, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, shared_k, shared_v, k, v, out, lse = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad, groups = grad.contiguous(), shared_k.shape[1]
        far = flash(
            fold_queries(grad, groups),
            fold_queries(q, groups),
            shared_k,
            shared_v,
            fold_queries(out, groups),
            fold_queries(lse[..., None], groups)[..., 0],
            0.0,
            False,
        )
        near = flash(grad, q, k, v, out, lse.contiguous(), 0.0, True)
        return unfold_queries(far[0], q) + near[0], far[1], far[2], near[1], near[2]


def fold_queries(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) to (1, G, B * H/G * T, D): all queries of a KV head in one row."""
    B, H, T, D = x.shape
    return x.view(B, groups, H // groups, T, D).transpose(0, 1).reshape(1, groups, -1, D).contiguous()


def unfold_queries(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold_queries`, for the B, H and T of `like`."""
    B, H, T, _ = like.shape
    groups = x.shape[1]
    return x.view(groups, B, H // groups, T, -1).transpose(0, 1).reshape(B, H, T, -1)


def share_attention(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ShareAttention` in plain PyTorch; the definition, and the path for other devices than the CPU."""
    B, H, T, _ = q.shape
    shared_k, shared_v = (x.repeat_interleave(H // x.shape[1], 1).expand(B, -1, -1, -1) for x in (shared_k, shared_v))
    mask = torch.ones(T, shared_k.shape[2] + T, dtype=torch.bool, device=q.device).tril(shared_k.shape[2])
    return F.scaled_dot_product_attention(q, torch.cat([shared_k, k], 2), torch.cat([shared_v, v], 2), mask)
