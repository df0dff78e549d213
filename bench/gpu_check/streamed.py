"""Prefill that streams its earlier keys and values to the device: logits of a tiny model, against stock transformers.

The rule is that of gpu_correct.py: the error against float64 on the CPU is at most twice that of the same mathematics
in float32, which is stock transformers on the device; of int8, what this package does on the CPU.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import retrieval_attn
from retrieval_attn.bench.gpu_check import correct as gpu_correct
from retrieval_attn.bench.gpu_check.end_to_end import random_ids, random_model
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import chunk_ends
from retrieval_attn.hf.versions import cache_argument

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

# Tokens of the prompt, and how many of them a later turn brings.
N, FOLLOWING = 1500, 300

# Of one token in all layers of SHAPE: two KV heads of 64 numbers, keys and values, in float32.
TOKEN_BYTES = 2 * 2 * 2 * 64 * 4

# Tiles and chunks end at different tokens; the last of both is not full.
CUT = {"prefill_tile": 200, "prefill_chunk": 640}

# All of them mean full attention: the pattern is wider than the prompt, and as many keys are retrieved as there are.
WAYS: dict[str, dict[str, Any]] = {
    "all streamed": {"device_kv_budget": 0, **CUT},
    "all streamed, one tile": {"device_kv_budget": 0, "prefill_chunk": 640},
    "a third kept": {"device_kv_budget": N * TOKEN_BYTES // 3, **CUT},
    "all kept": {"device_kv_budget": 2 * N * TOKEN_BYTES, **CUT},
    "sparse, a third kept": {"prefill": "a_shape", "device_kv_budget": N * TOKEN_BYTES // 3, **CUT},
    "int8, all streamed": {"kv_dtype": "int8", "device_kv_budget": 0, **CUT},
    "follow-up retrieves": {
        "followup": "retrieve",
        "index": "exact",
        "top_k": N,
        "estimator": "topk",
        "n_sink": 16,
        "n_local": 64,
        **CUT,
    },
}


class Setting(NamedTuple):
    """model: on the device, in float32. ids (1, N) there. true, plain: logits (N, V) of stock transformers."""

    model: LlamaForCausalLM
    ids: Tensor
    true: Tensor
    plain: Tensor


def cases(device: str, seed: int) -> list[gpu_correct.KernelCase]:
    """A case for each of `WAYS`; the model is made when the first is checked."""
    retrieval_attn.register()
    make = functools.cache(functools.partial(setting, device, seed))
    return [
        gpu_correct.KernelCase(f"prefill, {name}", functools.partial(check, make, RetrievalConfig(**options)))
        for name, options in WAYS.items()
    ]


def setting(device: str, seed: int) -> Setting:
    """The model's attention is peaked, so that a key too many or too few changes the logits."""
    model = random_model(SHAPE, "cpu", torch.float32, seed)
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj"):
            getattr(layer.self_attn, part).weight.data.mul_(8)
    ids = random_ids(model, N)
    model.set_attn_implementation("sdpa")
    true = copy.deepcopy(model).double()(ids).logits[0]
    model.to(device)
    plain = model(ids.to(device)).logits[0]
    model.set_attn_implementation("retrieval")
    return Setting(model, ids.to(device), true, plain)


def check(make: Callable[[], Setting], config: RetrievalConfig) -> tuple[float, float]:
    """The largest error of a logit, and what is allowed. Raises ValueError if the device keeps what it may not."""
    model, ids, true, plain = make()
    logits = read(model, ids, config)
    if config.kv_dtype == "int8":
        plain = read(copy.deepcopy(model).cpu(), ids.cpu(), config)
    rounding = torch.finfo(torch.float32).eps * float(true.abs().max())
    return _largest(logits, true), 2 * _largest(plain, true) + rounding


def read(model: LlamaForCausalLM, ids: Tensor, config: RetrievalConfig) -> Tensor:
    """Logits (N, V) of all tokens, read in chunks; the last ones retrieve if the config says so of later turns."""
    cache = retrieval_attn.RetrievalCache(model.config, config)
    first = N - FOLLOWING if config.followup == "retrieve" else N
    with cache.exact():
        parts = list(_chunks(model, ids, [0, *chunk_ends(first, config)], cache))
    _check_kept(cache, model.device)
    with cache.retrieving():
        parts += _chunks(model, ids, [first, N] if first < N else [], cache)
    return torch.cat(parts)


def _chunks(model: LlamaForCausalLM, ids: Tensor, ends: list[int], cache: Any) -> Iterator[Tensor]:
    for start, stop in itertools.pairwise(ends):
        yield model(input_ids=ids[:, start:stop], **cache_argument(cache), use_cache=True).logits[0]


def _check_kept(cache: retrieval_attn.RetrievalCache, device: torch.device) -> None:
    """A budget is filled with whole tokens, and not exceeded; a CPU keeps nothing twice."""
    budget = cache.config.device_kv_budget
    if budget is None:
        return
    wanted = min(N, budget // TOKEN_BYTES) if device.type == "cuda" else 0
    kept = {memory.device_prefix.length for memory in cache.memories}
    if kept != {wanted}:
        raise ValueError(f"device_kv_budget={budget} must keep {wanted} tokens of a layer, got {sorted(kept)}")


def _largest(found: Tensor, true: Tensor) -> float:
    """NaN is infinitely far."""
    return float((found.cpu().double() - true).abs().nan_to_num(torch.inf).max())
