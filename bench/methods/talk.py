"""A prompt that was read, and what is asked after it, whatever the method."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.versions import cache_argument


class Answer(NamedTuple):
    """What a method said, and what that cost: seconds from asking to the first token and for each later one, the share
    of the far keys that its searches looked at (None if it made none), bytes of keys and values and of indexes."""

    text: str
    token_ids: list[int]
    ttft_s: float
    itl_s: list[float]
    visited: float | None
    host_kv_bytes: int
    device_kv_bytes: int
    index_bytes: int


class Talk(Protocol):
    """A prompt that was read, and what is asked after it."""

    read_s: float
    build_s: float

    def fork(self) -> "Talk":
        """Another one from here on; what is asked of either, the other does not see."""

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        """Greedy tokens after `ids`, which begin with what was read and asked so far; only what follows is run."""


class Fed(NamedTuple):
    """What came of given tokens: the logits after each, (n, V) float32 in CPU memory, its seconds, and the share of the
    far keys that was looked at (None: all of them)."""

    logits: Tensor
    seconds: list[float]
    visited: float | None


class Read(NamedTuple):
    """A prompt that was read exactly, and the seconds it took."""

    ids: list[int]
    cache: RetrievalCache
    seconds: float


def bytes_of(layer: Any, where: str) -> int:
    """Bytes that a stock cache layer holds on "cpu" or "cuda"."""
    kept = (getattr(layer, name, None) for name in ("keys", "values", "_quantized_keys", "_quantized_values"))
    return sum(x.nbytes for part in kept for x in _tensors_of(part) if x.device.type == where)


def _tensors_of(held: Any) -> Iterator[Tensor]:
    """The tensors that something is made of: a quantised one says of itself what it would be if it were not."""
    if isinstance(held, tuple | list):
        for part in held:
            yield from _tensors_of(part)
    elif isinstance(held, dict):
        yield from _tensors_of(list(held.values()))
    elif isinstance(held, Tensor):
        names = held.__tensor_flatten__()[0] if hasattr(held, "__tensor_flatten__") else None
        yield from [held] if names is None else _tensors_of([getattr(held, name) for name in names])


def forward(model: Any, ids: Sequence[int], cache: DynamicCache) -> Tensor:
    """Logits (1, V) after the last of ids, which go on from what the cache holds."""
    tokens = torch.tensor([list(ids)], device=model.device)
    start = cache.get_seq_length()
    positions = torch.arange(start, start + tokens.shape[1], device=model.device)[None]
    return model(
        input_ids=tokens, position_ids=positions, **cache_argument(cache), use_cache=True, logits_to_keep=1
    ).logits[:, -1]
