"""Finds the pattern that each head of a model should prefill by: all are tried on a text, at equal cost.

After the search of MInference (arXiv 2407.02490, algorithm 1). What counts is the attention's output, not the mass that
a pattern keeps: keys whose values say the same may well be left out. The model reads the text once, unmodified; each
layer's queries, keys and values are tried as they pass, and the dense output goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrieval_attn.attention.pattern_files import ABSENT, save_patterns
from retrieval_attn.generate import OnProgress, Progress
from retrieval_attn.hf.attention import watched_attention
from retrieval_attn.kernels import HeadPattern, attend_dense, attend_patterns
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.patterns import fixed_index
from retrieval_attn.llm import LLM

# Keys per query; the paper's 1024 + 4096.
BUDGET = 5120

# Shorter texts, and smaller budgets, leave no room for what every pattern must read.
LEAST_TOKENS, LEAST_BUDGET = 2048, 512

# Columns of "vertical_slash" that are tried, up to what leaves room for the diagonals that are always read.
COLUMNS, ROOM = (30, 100, 500, 1000, 3000), 256

# Chunks of queries, spread over the second half of the text, that errors are taken on.
N_CHUNKS = 4

# Keys per query that are near enough to the budget: half a block of keys, or this share of it.
CLOSE_KEYS, CLOSE_SHARE = 32, 0.01


class Tried(NamedTuple):
    """A candidate of one head: its sizes, the keys that its lists hold per query, and what that does to the output.

    error: L2 distance of the head's output to that of dense attention, over the length of the latter.
    """

    pattern: HeadPattern
    keys: float
    error: float


@dataclass(frozen=True)
class SearchedPatterns:
    """What a search has found.

    tried: of every layer, every query head, and every candidate. Layers without full attention (sliding windows) were
    not searched and are empty. budget: keys per query of all candidates. n_tokens: length of the text.
    """

    tried: list[list[list[Tried]]]
    n_heads: int
    budget: int
    n_tokens: int

    @property
    def best(self) -> list[list[Tried]]:
        """The candidate of smallest error of each head of each layer; nothing for a layer that was not searched."""
        return [[min(head, key=lambda tried: tried.error) for head in layer] for layer in self.tried]

    @property
    def patterns(self) -> list[list[HeadPattern]]:
        """One for each head of every layer of the model; the default, which nothing reads, where none was searched."""
        return [[tried.pattern for tried in layer] or [ABSENT] * self.n_heads for layer in self.best]

    @property
    def scores(self) -> list[list[float]]:
        """1 minus the error of the pattern: 1 is exact, higher is better. 0 where none was searched."""
        return [[1 - tried.error for tried in layer] or [0.0] * self.n_heads for layer in self.best]

    def save(self, path: str | Path) -> None:
        """Write the patterns for `RetrievalConfig(prefill=path)`; see `pattern_files.save_patterns`."""
        save_patterns(path, self.patterns, self.scores)


def search_patterns(
    llm: LLM, token_ids: Sequence[int], *, budget: int | None = None, on_progress: OnProgress | None = None
) -> SearchedPatterns:
    """Find the pattern of each head by letting the model read a text of at least 2048 tokens.

    budget: keys per query that every candidate may list, from 512 to a quarter of the text; None takes 5120, or that
    quarter. Sizes found on one length serve all, as in the paper. Errors are taken on a few chunks of
    `llm.config.prefill_chunk` queries, as the runtime cuts a prompt, from the second half of the text. on_progress:
    told of phase "search", in candidates of layers.
    The text is read in one pass: activations of all tokens are in memory, and of models with sliding windows a mask of
    bytes, tokens by tokens. Not for use while another thread uses the model.
    Raises ValueError for a text or a budget of another size, a model with masks of its own, or NaN in its attention.
    """
    ids = llm.encode(token_ids)
    budget = choose_budget(len(ids), budget)
    text = llm.model.config.get_text_config(decoder=True)
    n_steps = text.num_hidden_layers * len(candidates(budget))
    report = on_progress or (lambda progress: None)
    report(Progress("search", 0, n_steps))
    reading = _Pass(budget, llm.config.prefill_chunk, lambda done: report(Progress("search", done, n_steps)))
    with torch.inference_mode(), watched_attention(llm.model, reading.attend):
        llm.model.base_model(input_ids=torch.tensor([ids], device=llm.model.device), use_cache=False)
    report(Progress("search", n_steps, n_steps))
    tried = [reading.found.get(layer, []) for layer in range(text.num_hidden_layers)]
    return SearchedPatterns(tried, text.num_attention_heads, budget, len(ids))


def choose_budget(n_tokens: int, budget: int | None) -> int:
    """Keys per query for a text of so many tokens, if `budget` is what was asked for; errors as of the search."""
    if n_tokens < LEAST_TOKENS:
        raise ValueError(f"the text must have at least {LEAST_TOKENS} tokens, got {n_tokens}")
    # With more of the text, patterns would hardly differ.
    most = n_tokens // 4
    if budget is None:
        return min(BUDGET, most)
    if not isinstance(budget, int) or not LEAST_BUDGET <= budget <= most:
        raise ValueError(f"budget must be between {LEAST_BUDGET} and {most} (a quarter of the text), got {budget!r}")
    return budget


class _Pass:
    """The attention of the model while it reads, and what was tried, by layer."""

    def __init__(self, budget: int, chunk: int, report: Callable[[int], None]) -> None:
        self.found: dict[int, list[list[Tried]]] = {}
        self._budget, self._chunk, self._report = budget, chunk, report

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query (1, H, T, D), key and value (1, G, T, D); returns (1, T, H, D)."""
        layer = module.layer_idx
        if attention_mask is not None:
            raise ValueError(f"patterns are for causal attention, but layer {layer} asks for a mask of its own on top")
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        dense = attend_dense(query, key, value, scale, causal=True).out
        if not dense.isfinite().all():
            raise ValueError(f"the attention of layer {layer} holds NaN or infinity; try dtype='float32'")
        done = layer * len(candidates(self._budget))
        seen = Attended(query, key, value, dense)
        self.found[layer] = search_layer(seen, scale, self._budget, self._chunk, lambda i: self._report(done + i))
        return dense.transpose(1, 2).contiguous(), None


class Attended(NamedTuple):
    """Queries (1, H, T, D), the keys and values (1, G, S, D) up to the last of them, and the dense output."""

    query: Tensor
    keys: Tensor
    values: Tensor
    dense: Tensor

    def chunk(self, rows: slice) -> "Attended":
        """Some of the queries; for all of a text, S = T."""
        keys, values = (x[:, :, : rows.stop] for x in (self.keys, self.values))
        return Attended(self.query[:, :, rows], keys, values, self.dense[:, :, rows])


def search_layer(
    layer: Attended, scale: float, budget: int, chunk: int, step: Callable[[int], None] = lambda i: None
) -> list[list[Tried]]:
    """What every head of a layer has tried on a whole text, in `chunk` queries per call of the kernel.

    budget: keys per query. step: called with the number of candidates that are done.
    """
    n_heads, n_tokens = layer.query.shape[1:3]
    chunks = [layer.chunk(rows) for rows in sample_chunks(n_tokens, chunk)]
    tried: list[list[Tried]] = [[] for _ in range(n_heads)]
    for i, family in enumerate(candidates(budget), 1):
        sized = fit_sizes(chunks, scale, family, budget)
        errors = output_errors(chunks, scale, [pattern for pattern, _ in sized])
        for head, found, error in zip(tried, sized, errors, strict=True):
            head.append(Tried(*found, error))
        step(i)
    return tried


def sample_chunks(n_tokens: int, size: int) -> list[slice]:
    """Up to `N_CHUNKS` chunks of `size` tokens, evenly spread over the second half of a text, the last at its end."""
    half = n_tokens // 2
    size = min(size, half)
    n_chunks = min(N_CHUNKS, half // size)
    gaps = max(1, n_chunks - 1)
    starts = [n_tokens - size - (half - size) * i // gaps for i in range(n_chunks)]
    return [slice(start, start + size) for start in sorted(starts)]


def candidates(budget: int) -> list[HeadPattern]:
    """What is tried, without the one size that is left to fit the budget; see `with_size`."""
    sinks = (64, budget // 5, budget // 2)
    columns = dict.fromkeys(min(n, budget - ROOM) for n in COLUMNS)
    return [
        *(HeadPattern("a_shape", n) for n in sinks),
        *(HeadPattern("vertical_slash", n) for n in columns),
        HeadPattern("block_sparse"),
    ]


def with_size(family: HeadPattern, size: int) -> HeadPattern:
    """A candidate with so many last tokens ("a_shape"), diagonals ("vertical_slash") or blocks ("block_sparse")."""
    return family._replace(vertical=size) if family.kind == "block_sparse" else family._replace(slash=size)


def fit_sizes(
    chunks: list[Attended], scale: float, family: HeadPattern, budget: int
) -> list[tuple[HeadPattern, float]]:
    """The pattern of each head, and the keys that it lists per query, which are as near to the budget as can be.

    What a number of diagonals costs is for each head to say, for it depends on how many share a block.
    """
    n_heads = chunks[0].query.shape[1]
    low, high = [1] * n_heads, [budget] * n_heads
    best = [(family, math.inf)] * n_heads
    close = max(CLOSE_KEYS, CLOSE_SHARE * budget)
    while heads := [h for h in range(n_heads) if abs(best[h][1] - budget) > close and high[h] - low[h] > 1]:
        # Costs grow fast at first, so the middle is that of the logarithms.
        sizes = [max(low[h] + 1, math.isqrt(low[h] * high[h])) for h in heads]
        patterns = [with_size(family, size) for size in sizes]
        for h, size, pattern, n in zip(heads, sizes, patterns, count_keys(chunks, scale, heads, patterns), strict=True):
            if abs(n - budget) < abs(best[h][1] - budget):
                best[h] = pattern, n
            (high if n > budget else low)[h] = size
    return best


def count_keys(chunks: list[Attended], scale: float, heads: list[int], patterns: list[HeadPattern]) -> list[float]:
    """Keys in the lists of some heads per query, in the mean over the chunks. patterns: one for each of `heads`."""
    R = chunks[0].query.shape[1] // chunks[0].keys.shape[1]
    n_keys = [0.0] * len(heads)
    for pattern in dict.fromkeys(patterns):
        places = [i for i, other in enumerate(patterns) if other == pattern]
        asked = [heads[i] for i in places]
        for chunk in chunks:
            layout = Layout(chunk.query.shape[2], chunk.keys.shape[2])
            index = fixed_index(chunk.query[0, asked], chunk.keys[0, [h // R for h in asked]], scale, pattern, layout)
            listed = (index.n_blocks * index.width + index.n_columns)[0].float().mean(1)  # [len(asked)]
            for i, n in zip(places, listed.tolist(), strict=True):
                n_keys[i] += n / len(chunks)
    return n_keys


def output_errors(chunks: list[Attended], scale: float, patterns: list[HeadPattern]) -> list[float]:
    """The relative L2 error of each head's output, over all chunks."""
    missed, total = torch.zeros(2, len(patterns), device=chunks[0].query.device)
    for chunk in chunks:
        out = attend_patterns(chunk.query, chunk.keys, chunk.values, scale, patterns).out.float()
        missed += (out - chunk.dense.float()).square().sum((0, 2, 3))
        total += chunk.dense.float().square().sum((0, 2, 3))
    return (missed / total.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().tolist()
