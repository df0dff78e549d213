"""Dense exact attention, a tile of keys at a time: chunked prefill calls it once per tile and merges.

PyTorch's fused kernels do the work, called by their own names because only those return the lse. They never write out
the T x S scores. Where none of them fits, a tiled float32 path in plain PyTorch does, and says so once.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from retrieval_attn.kernels.merge import AttentionState, attend, merge

log = logging.getLogger("retrieval_attn")

# Queries and keys per tile of the plain path: its scores take 4 MiB per head.
TILE = 1024

# (query, keys, values, scale, causal) -> (out, lse); all of one dtype and one number of heads.
Engine = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool = False) -> AttentionState:
    """Exact attention of every query to every key, or causally.

    query: (B, H, T, D); keys: (B, G, S, D); values: (B, G, S, Dv), on one device; KV head of query head h is h // R.
    causal: the queries are the last T of the S positions, so query t sees keys 0 .. S - T + t.
    Accumulates in float32; returns `out` in the query's dtype. Keys of another dtype than the query's are converted.
    Never writes out T x S scores; no keys give the empty state.
    Raises ValueError for shapes that do not fit, and if causal for S < T.
    Leaves its arguments unchanged; safe from many threads.
    """
    check_attention(query, keys, values)
    T, S = query.shape[2], keys.shape[2]
    if causal and S < T:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {S} keys and {T} queries")
    # The fused CPU kernel divides by these lengths; an empty axis would end the process.
    if T == 0 or S == 0:
        return AttentionState.empty((*query.shape[:3], values.shape[3]), query.dtype, query.device)
    if not causal:
        return _attend_all(query, keys, values, scale)
    past = S - T
    chunk = _attend_chunk(query, keys[:, :, past:], values[:, :, past:], scale)
    if past == 0:
        return chunk
    # Fused kernels disagree on where the diagonal of a T x S rectangle lies: give them a square and a full block.
    return merge(chunk, _attend_all(query, keys[:, :, :past], values[:, :, :past], scale))


def check_attention(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError unless query (B, H, T, D), keys (B, G, S, D) and values (B, G, S, Dv) fit together."""
    if not query.ndim == keys.ndim == values.ndim == 4:
        problem = "must be (B, heads, length, D)"
    elif keys.shape[:3] != values.shape[:3] or keys.shape[0] != query.shape[0] or keys.shape[3] != query.shape[3]:
        problem = "must agree as (B, H, T, D), (B, G, S, D) and (B, G, S, Dv)"
    elif keys.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        problem = "must have heads H a multiple of G"
    elif not query.device == keys.device == values.device:
        devices = ", ".join(str(x.device) for x in (query, keys, values))
        raise ValueError(f"query, keys and values must be on one device, got {devices}")
    else:
        return
    shapes = ", ".join(str(tuple(x.shape)) for x in (query, keys, values))
    raise ValueError(f"query, keys and values {problem}, got {shapes}")


def common_dtype(*tensors: Tensor, wide: bool = False) -> torch.dtype:
    """The dtype that holds all of `tensors`; with `wide`, at least float32."""
    common = torch.float32 if wide else tensors[0].dtype
    for x in tensors:
        if x.dtype != common:
            common = torch.promote_types(common, x.dtype)
    return common


def fold_group(query: Tensor, n_kv_heads: int) -> Tensor:
    """(B, H, T, D) as (B, G, R * T, D): the heads of a group become more queries to the same keys."""
    B, _, _, D = query.shape
    return query.reshape(B, n_kv_heads, -1, D)


def unfold_group(state: AttentionState, query: Tensor) -> AttentionState:
    """What was computed for `fold_group(query)`, as (B, H, T, D) and in the query's dtype."""
    B, H, T, _ = query.shape
    return AttentionState(state.out.reshape(B, H, T, -1).to(query.dtype), state.lse.reshape(B, H, T).float())


def _attend_all(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> AttentionState:
    folded = fold_group(query, keys.shape[1])
    return unfold_group(_run(folded, keys, values, scale, causal=False), query)


def _attend_chunk(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> AttentionState:
    """Causal over a square. Each group becomes a batch entry whose one KV head is seen by all its query heads."""
    B, G, T, _ = keys.shape
    R = query.shape[1] // G

    def shared(x: Tensor) -> Tensor:
        return x.reshape(B * G, 1, T, x.shape[3]).expand(-1, R, -1, -1)

    grouped = query.reshape(B * G, R, T, query.shape[3])
    return unfold_group(_run(grouped, shared(keys), shared(values), scale, causal=True), query)


def _run(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> AttentionState:
    dtype = common_dtype(query, keys, values)
    # CPUs convert float16 faster than they compute with it: 1.4 times at prefill, 5 times at decode.
    if dtype == torch.float16 and query.device.type == "cpu":
        dtype = torch.float32
    query, keys, values = (_with_whole_rows(x.to(dtype)) for x in (query, keys, values))
    engine = _pick_engine(query.device, dtype, query.shape[3], values.shape[3])
    return AttentionState(*engine(query, keys, values, scale, causal))


def _with_whole_rows(x: Tensor) -> Tensor:
    """Fused kernels take any strides but assume that a row's elements are neighbours, without looking."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _pick_engine(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> Engine:
    """The fused kernel for these inputs, or the plain path; the cache makes it speak once per case."""
    what = f"{dtype} of dimension {key_dim} and {value_dim}"
    if device.type == "cpu":
        if key_dim == value_dim:
            return _cpu_flash
        reason = f"the fused kernel wants keys and values of one dimension, got {what}"
    elif device.type == "cuda":
        engine = _pick_cuda_engine(device, dtype, key_dim, value_dim)
        if engine is not None:
            return engine
        reason = f"no fused kernel for {what} on {torch.cuda.get_device_name(device)}"
    else:
        reason = f"no fused kernel for devices of type {device.type!r}"
    log.warning("dense attention runs in plain PyTorch, which is slower: %s", reason)
    return _tiled


def _pick_cuda_engine(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> Engine | None:
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    if key_dim % 8 or value_dim % 8 or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    if ampere and dtype != torch.float32 and key_dim == value_dim <= 256:
        return _cuda_flash
    return _cuda_efficient if ampere or dtype != torch.bfloat16 else None


def _cpu_flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, keys, values, 0.0, causal, scale=scale)


def _cuda_flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(query, keys, values, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_efficient(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = op(query, keys, values, None, True, 0.0, causal, scale=scale)
    # The kernel pads its lse to a multiple of 32 queries.
    return out, lse[..., : query.shape[2]]


def _tiled(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    wide = common_dtype(query, wide=True)
    rows = []
    for t in range(0, query.shape[2], TILE):
        block = query[:, :, t : t + TILE].to(wide) * scale
        end = t + block.shape[2] if causal else keys.shape[2]
        tiles = (slice(s, min(s + TILE, end)) for s in range(0, end, TILE))
        rows.append(merge(*(_attend_tile(block, keys, values, tile, t if causal else None) for tile in tiles)))
    return AttentionState.beside(rows, 2)


def _attend_tile(block: Tensor, keys: Tensor, values: Tensor, tile: slice, diagonal: int | None) -> AttentionState:
    scores = block @ keys[:, :, tile].to(block.dtype).mT  # [B, H, TILE, TILE]
    if diagonal is not None and tile.stop > diagonal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal - tile.start + 1)
        scores.masked_fill_(future, -torch.inf)
    return attend(scores, values[:, :, tile].to(block.dtype))
