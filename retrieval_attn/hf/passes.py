"""Forward passes of a model against a cache: each token at its own position, turned as part of its whole text."""

import inspect
from typing import Any

import torch
from torch import Tensor

from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.rope import Turning
from retrieval_attn.hf.served import model_type
from retrieval_attn.hf.versions import cache_argument


class Passes:
    """What feeds tokens to a model. length: of the whole text, in the longest row, of which the tokens are a part.

    Both methods raise ValueError, naming the model, if it did not put into the cache what it was fed.
    """

    def __init__(self, model: Any, cache: RetrievalCache) -> None:
        self.cache = cache
        self._model = model
        self._turning = Turning(model)
        self._taken = {module: inspect.signature(module.forward).parameters for module in (model, model.base_model)}

    def logits(self, ids: Tensor, length: int, **rows: Tensor) -> Tensor:
        """Feed ids (B, T) and return the logits (B, V) after the last. rows: `attention_mask` and `position_ids` of
        rows that are padded; else each token stands after those in the cache."""
        return self._run(self._model, ids, length, {"logits_to_keep": 1, **rows}).logits[:, -1]

    def read(self, ids: Tensor, length: int, **rows: Tensor) -> None:
        """Feed ids (B, T), as `logits` does, without asking what comes next."""
        self._run(self._model.base_model, ids, length, rows)

    def _run(self, module: Any, ids: Tensor, length: int, options: dict[str, Any]) -> Any:
        held, n_new = self.cache.get_seq_length(), ids.shape[1]
        positions = torch.arange(held, held + n_new, device=ids.device).expand(ids.shape[0], -1)
        options = {"position_ids": positions} | options
        if "attention_mask" in options and "attention_mask" not in self._taken[module]:
            raise ValueError(f"{model_type(self._model.config)!r} takes no mask, so it answers prompts one by one only")
        taken = {name: value for name, value in options.items() if name in self._taken[module]}
        self.cache.text_length = length
        with self._turning.of_text(length), self.cache.moving():
            out = module(input_ids=ids, **taken, **cache_argument(self.cache), use_cache=True)
        if self.cache.get_seq_length() != held + n_new:
            raise ValueError(
                f"{model_type(self._model.config)!r} does not keep its tokens in the cache that it is given, so there "
                "is nothing to retrieve; it cannot be served"
            )
        return out
