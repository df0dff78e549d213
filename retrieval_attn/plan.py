"""What a prompt will take, said before it is taken."""

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from retrieval_attn.choose import bytes_per_key, choose_index
from retrieval_attn.config import RetrievalConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a context of `n_tokens` takes.

    host_kv: keys and values in CPU memory. index: the indexes beside them. device_kv: the near window, on the device.
    """

    n_tokens: int
    host_kv: int
    index: int
    device_kv: int

    @property
    def host(self) -> int:
        """All bytes in CPU memory."""
        return self.host_kv + self.index

    def __str__(self) -> str:
        return (
            f"{self.n_tokens} tokens: {self.host_kv / GIB:.2f} GiB of keys and values and {self.index / GIB:.2f} GiB "
            f"of index in CPU memory, {self.device_kv / GIB:.2f} GiB near"
        )

    def check(self, already: int = 0) -> None:
        """Raise MemoryError, with the numbers, if the machine lacks the memory; `already` bytes are held by now."""
        free = psutil.virtual_memory().available
        need = self.host - already
        if need > free:
            raise MemoryError(
                f"{self.n_tokens} tokens need {need / GIB:.1f} GiB more of CPU memory, but {free / GIB:.1f} GiB are "
                "free; use a shorter text, close other programs, or choose a model with fewer KV heads"
            )


def plan_memory(model_config: Any, n_tokens: int, dtype: torch.dtype, config: RetrievalConfig) -> MemoryPlan:
    """The memory that `n_tokens` of context take for one sequence of this model."""
    text = model_config.get_text_config(decoder=True)
    n_layers = sum(type(layer) is DynamicLayer for layer in DynamicCache(config=model_config).layers)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row = 2 * dim * dtype.itemsize
    n_near = min(n_tokens, config.n_sink + config.n_local)
    kind = choose_index(config, n_tokens - n_near, n_layers, heads, dim).kind
    return MemoryPlan(
        n_tokens=n_tokens,
        host_kv=n_layers * heads * row * n_tokens,
        index=n_layers * heads * bytes_per_key(kind, dim) * (n_tokens - n_near),
        device_kv=n_layers * heads * row * (config.n_sink + config.n_local),
    )
