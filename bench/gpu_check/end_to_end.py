"""Prefill of a whole model with random weights: stock transformers beside our cache, exact and sparse."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import retrieval_attn
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.machine import PeakMemory, synchronize
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import chunk_ends
from retrieval_attn.hf.versions import cache_argument

# The first is stock transformers with sdpa, the prompt in one pass. The weights are random, and so is what heads look
# at: "auto" decides by that, the last one reads as much of any prompt.
METHODS = ("stock", "dense", "auto", "vertical_slash")

# The shape of Llama 3 8B.
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 20,
    "rope_theta": 500_000.0,
}

# Share of the peak that a prefill is taken to reach, to foresee how long one takes.
_EFFICIENCY = 0.3


def random_model(shape: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """Weights are drawn where they stay, in their dtype."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def measure_model(
    model: LlamaForCausalLM, lengths: tuple[int, ...], device: str, peak: float, left: Callable[[], float]
) -> Iterator[Row]:
    """A row per length and method; "skipped" where it would take longer than there is time left.

    peak: operations per second that the device can do. left: seconds left.
    """
    retrieval_attn.register()
    warm = random_ids(model, min(lengths) // 4)
    for length in lengths:
        expected = prefill_seconds(model.config, length, peak)
        for method in METHODS:
            row: Row = {"part": "end to end", "context": length, "method": method, "status": "failed", "reason": None}
            row |= dict.fromkeys(("prefill_s", "tokens_per_s", "peak_device_bytes", "read", "patterns"))
            if expected > left():
                row |= {"status": "skipped", "reason": f"it would take {expected:.0f} s, {max(0, left()):.0f} are left"}
            else:
                with torch.no_grad(), Failing(row):
                    if length == min(lengths):
                        _run(model, method, warm, device, dict(row))
                    _run(model, method, random_ids(model, length), device, row)
            yield row


def prefill_seconds(config: LlamaConfig, n_tokens: int, peak: float, most_keys: int | None = None) -> float:
    """About how long a prefill takes; peak: operations per second that the device can do, most_keys: as in `flops`."""
    return flops(config, n_tokens, most_keys) / (_EFFICIENCY * peak)


def flops(config: LlamaConfig, n_tokens: int, most_keys: int | None = None) -> float:
    """Of a prefill: two per weight and token, four per dimension of a head and pair of tokens.

    most_keys: that a token attends to, if its attention is sparse.
    """
    dim = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_key_value_heads * dim
    weights = config.hidden_size * (2 * config.hidden_size + kv + 3 * config.intermediate_size)
    full = min(n_tokens, most_keys or n_tokens)
    pairs = config.num_attention_heads * (full * (full + 1) / 2 + (n_tokens - full) * full)
    return float(config.num_hidden_layers * (2 * weights * n_tokens + 4 * dim * pairs))


def random_ids(model: LlamaForCausalLM, n: int) -> Tensor:
    make = torch.Generator().manual_seed(n)
    return torch.randint(model.config.vocab_size, (1, max(1, n)), generator=make).to(model.device)


def _run(model: LlamaForCausalLM, method: str, ids: Tensor, device: str, row: Row) -> None:
    """Read the prompt once, and note what it cost."""
    run = _stock if method == "stock" else _ours
    model.set_attn_implementation("sdpa" if method == "stock" else "retrieval")
    with PeakMemory(device) as memory:
        synchronize(device)
        started = time.perf_counter()
        cache = run(model, method, ids)
        synchronize(device)
        row["prefill_s"] = time.perf_counter() - started
    row |= {"tokens_per_s": ids.shape[1] / row["prefill_s"], "peak_device_bytes": memory.device or None}
    row["status"] = "ok"
    if isinstance(cache, retrieval_attn.RetrievalCache):
        layers = [layer.prefilled for layer in cache.retrieval_layers]
        visible = sum(counts.n_visible for counts in layers)
        # With sizes that are given nobody counts.
        read = [counts.n_read for counts in layers if counts.n_read is not None]
        row["read"] = sum(read) / visible if visible and len(read) == len(layers) else None
        kinds = [kind for counts in layers for kind in counts.kinds.elements()]
        row["patterns"] = {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}


def _stock(model: LlamaForCausalLM, method: str, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=ids, **cache_argument(cache), use_cache=True)
    return cache


def _ours(model: LlamaForCausalLM, method: str, ids: Tensor) -> DynamicCache:
    """In chunks, as the runtime does, each layer's tokens going to CPU memory."""
    config = RetrievalConfig(prefill=method)
    cache, done = retrieval_attn.RetrievalCache(model.config, config), 0
    with cache.exact():
        for stop in chunk_ends(ids.shape[1], config):
            model.base_model(input_ids=ids[:, done:stop], **cache_argument(cache), use_cache=True)
            done = stop
    return cache


def describe(row: Row) -> str:
    """One line of the log."""
    what = f"{row['context']:>8} tokens, {row['method']}"
    if row["status"] != "ok":
        return f"{row['status']:8}{what}: {row['reason']}"
    memory = row["peak_device_bytes"]
    return (
        f"{'ok':8}{what}: {row['prefill_s']:.2f} s, {row['tokens_per_s']:,.0f} tokens/s"
        + (f", {memory / 2**30:.1f} GiB on the device" if memory else "")
        + (f", {100 * row['read']:.0f} % of the keys read" if row["read"] else "")
    )
