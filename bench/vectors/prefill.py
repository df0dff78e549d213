"""Queries, keys and values of a whole prompt, for what attends to all of it: sparse prefill and its rivals.

`sources.py` keeps what an index sees of a layer, the far keys and a sample of the queries. Here is a query at every
position and no token is left out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from retrieval_attn.bench.vectors.capture import _row, _Script
from retrieval_attn.bench.vectors.mixed import mixed
from retrieval_attn.bench.vectors.shaped import shaped
from retrieval_attn.hf.attention import watched_attention
from retrieval_attn.llm import load

# "real" stands for "real:<layer>".
SOURCES = ("real", "shaped", "shaped_mixed")


class Prompt(NamedTuple):
    """query: (1, H, S, D); keys, values: (1, G, S, D), after rotary encoding, contiguous, of one dtype on the CPU."""

    query: Tensor
    keys: Tensor
    values: Tensor


def prefill_vectors(
    source: str, *, S: int, seed: int, H: int = 32, G: int = 8, D: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Prompt:
    """One layer's vectors of a prompt of S tokens; the same arguments give the same vectors.

    source:
    - "real:<layer>": what that layer of the embedded model is given while it reads a document with facts in it. It has
      the H, G and D that it has; those asked for play no part.
    - "shaped": `shaped.shaped`, asked at every position. Every query retrieves an earlier token of its own, and
      nothing else: no sink, no neighbourhood. The hardest prompt there is for a pattern.
    - "shaped_mixed": heads that also look at the first tokens, nearby, along columns, diagonals and passages, in the
      shares of `mixed.MIXES`.
    H query heads over G KV heads of dimension D, a multiple of 16; of "shaped_mixed" a multiple of 32 from 64 on.
    Raises ValueError for an unknown source and for shapes that no layer has.
    """
    name, layer = check_source(source)
    if name == "real":
        assert layer is not None
        return _read_document(layer, S, seed, dtype)
    if name == "shaped":
        made = shaped(S, H, G, D, S, 1, seed, dtype)
        return Prompt(made.prefill_queries[None].contiguous(), made.keys[None], made.values[None])
    return Prompt(*mixed(S, H, G, D, seed, dtype)[:3])


def check_source(source: str) -> tuple[str, int | None]:
    """The name of a source and the layer of a real one; ValueError for what is none."""
    name, colon, layer = source.partition(":")
    if name not in SOURCES or bool(colon) != (name == "real") or (colon and not layer.isdecimal()):
        raise ValueError(f"source must be one of real:<layer>, {', '.join(SOURCES[1:])}, got {source!r}")
    return name, int(layer) if colon else None


class _Reader:
    """An attention function that notes what one layer is given, and spares the later ones their work."""

    def __init__(self, layer: int) -> None:
        self.found: tuple[Tensor, ...] = ()
        self._layer = layer

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query (1, H, S, D), key and value (1, G, S, D)."""
        if module.layer_idx == self._layer:
            self.found = query, key, value
        if module.layer_idx >= self._layer:
            return torch.zeros_like(query).transpose(1, 2), None
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None


def _read_document(layer: int, S: int, seed: int, dtype: torch.dtype) -> Prompt:
    """The document is the one that `capture.capture` has read for as many tokens."""
    llm = load(None, device="cpu")
    n_layers = llm.model.config.num_hidden_layers
    if layer >= n_layers:
        raise ValueError(f"layer must be between 0 and {n_layers - 1}, got {layer}")
    # A document has a fact to ask for among the tokens that are not near its ends.
    least = 1024
    if not least <= S <= llm.max_tokens:
        raise ValueError(f"S must be between {least} and {llm.max_tokens} for the embedded model, got {S}")
    reader = _Reader(layer)
    document = _Script.written(llm, S, seed, None).document
    with torch.inference_mode(), watched_attention(llm.model, reader.attend):
        llm.model.base_model(input_ids=_row(document, llm), use_cache=False)
    # Inference tensors could not be written to, nor saved for anything that follows.
    return Prompt(*(x.to(dtype, memory_format=torch.contiguous_format, copy=True) for x in reader.found))
