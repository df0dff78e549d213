"""The embedded model, and its forward pass behind a document that was read already."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from retrieval_attn.bench.train.shared_context import Context, ShareAttention, share_attention
from retrieval_attn.bench.train.tokenizer import MAX_POSITIONS

# Rotary pairs with wavelengths of 4 thousand to 600 thousand tokens at theta = 1e10 and head_dim = 64.
MIDDLE_PAIRS = slice(9, 17)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A random model with local heads in its first layer."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    plant_local_heads(model)
    silence_middle_pairs(model)
    return model


@torch.no_grad()
def plant_local_heads(model: Qwen2ForCausalLM, strength: float = 6.0) -> None:
    """Turn query head 0 of layer 0 to the previous token, and heads 1 and 3 to the last hundred, through biases alone.

    On chosen rotary pairs every key starts as (strength, 0), and every query as the same vector turned back by one
    position: the product is largest one position back. The fastest pairs tell neighbours apart. Alone they would come
    round again by chance somewhere in a long text; pairs 6 to 8 (wavelengths 500 to 2,000) keep the distant ones out.
    Pair i is made of dimensions i and i + D/2.
    """
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq.float()
    keys, queries = (_by_pair(p.bias, attention.head_dim) for p in (attention.k_proj, attention.q_proj))
    for projection in (attention.q_proj, attention.k_proj):
        weight = _by_pair(projection.weight, attention.head_dim)
        weight[0] *= 0.1
        weight[:, :, 6:9] *= 0.1
    for kv_head, pairs in ((0, slice(0, 9)), (1, slice(6, 9))):
        keys[kv_head, 0, pairs] = strength
    for head, pairs in ((0, slice(0, 9)), (1, slice(6, 9)), (3, slice(6, 9))):
        queries[head, 0, pairs] = strength * torch.cos(frequencies[pairs])
        queries[head, 1, pairs] = -strength * torch.sin(frequencies[pairs])


def _by_pair(tensor: Tensor, head_dim: int) -> Tensor:
    """A view of a projection's weight or bias as (heads, 2, D/2, ...): [:, :, i] is rotary pair i."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])


@torch.no_grad()
def silence_middle_pairs(model: Qwen2ForCausalLM) -> None:
    """Zero the rotary pairs in `MIDDLE_PAIRS` of every query and key.

    Faster pairs turn full circle many times within the training lengths and slower ones hardly move within a million
    tokens: both mean the same at any length. The pairs between them would meet new angles with each doubling.
    """
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for tensor in (projection.weight, projection.bias):
                _by_pair(tensor, layer.self_attn.head_dim)[:, :, MIDDLE_PAIRS] = 0


def project_heads(x: Tensor, projection: nn.Linear, head_dim: int) -> Tensor:
    """(B, T, hidden) to (B, heads, T, head_dim)."""
    B, T, _ = x.shape
    return projection(x).view(B, T, -1, head_dim).transpose(1, 2)


def attend(
    model: Qwen2ForCausalLM, layer: Any, h: Tensor, shared: Tensor | None, log_weights: Tensor | None = None
) -> Tensor:
    """The attention block of one layer for rows h (B, T, hidden) that follow the shared rows (1, N, hidden), if any.

    log_weights (B, T), without shared rows only: added to the logits of each key, as if it stood there that many times.
    """
    attention, D = layer.self_attn, layer.self_attn.head_dim
    x = layer.input_layernorm(h)
    q, k, v = (project_heads(x, p, D) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    before = 0 if shared is None else shared.shape[1]
    positions = torch.arange(before + h.shape[1], device=h.device)[None]
    cos, sin = (t.to(q.dtype) for t in model.model.rotary_emb(h, positions))
    q, k = apply_rotary_pos_emb(q, k, cos[:, before:], sin[:, before:])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if shared is None:
        if log_weights is not None:
            q, k, v = _weigh(q, k, v, log_weights)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=D**-0.5)[..., :D]
    else:
        y = layer.input_layernorm(shared)
        shared_k, shared_v = project_heads(y, attention.k_proj, D), project_heads(y, attention.v_proj, D)
        shared_k, _ = apply_rotary_pos_emb(shared_k, shared_k, cos[:, :before], sin[:, :before])
        kernel = ShareAttention.apply if q.device.type == "cpu" else share_attention
        out = kernel(q.contiguous(), shared_k.contiguous(), shared_v.contiguous(), k.contiguous(), v.contiguous())
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _weigh(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eight more dimensions, the first of which adds log_weights to the scaled logits."""
    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, 8)) for x in (q, k, v))
    # Two terms, so that the product is good to bfloat16's square.
    coarse = log_weights.to(k.dtype)
    q[..., width : width + 2] = width**0.5
    k[..., width] = coarse[:, None]
    k[..., width + 1] = (log_weights - coarse.float())[:, None].to(k.dtype)
    return q, k, v


def forward(
    model: Qwen2ForCausalLM, ids: Tensor, context: Context | None = None, log_weights: Tensor | None = None
) -> Tensor:
    """Final hidden states of rows ids (B, T), each standing right behind the context."""
    h = model.model.embed_tokens(ids)
    for i, layer in enumerate(model.model.layers):
        h = h + attend(model, layer, h, context.inputs[i] if context else None, log_weights)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.model.norm(h)


@torch.no_grad()
def read_context(model: Qwen2ForCausalLM, ids: Tensor) -> Context:
    """Run a document (1, N) forward, layer by layer; the last layer need not run."""
    h = model.model.embed_tokens(ids)
    inputs = [h]
    for layer in model.model.layers[:-1]:
        h = h + attend(model, layer, h, None)
        for piece in h.split(16_384, dim=1):
            piece += layer.mlp(layer.post_attention_layernorm(piece))
        inputs.append(h)
    return Context([x.to(torch.bfloat16) for x in inputs])
