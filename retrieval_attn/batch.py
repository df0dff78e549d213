"""Several prompts at once, padded on the left: one pass for all rows, a window, store and index for each."""

import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from retrieval_attn.config import Sampling
from retrieval_attn.generate import (
    GenerationStats,
    OnProgress,
    Progress,
    Sampler,
    chunk_ends,
    follow_builds,
    longest_context,
    stop_reason,
    summarise,
)
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.passes import Passes
from retrieval_attn.plan.plan import MemoryPlan

# Any id of the vocabulary would do: it is masked wherever it stands.
PADDING = 0


class Row:
    """One prompt of a batch and its answer so far; `stop_reason` is empty while more is to come."""

    def __init__(self, ids: list[int], sampling: Sampling, device: torch.device) -> None:
        self.ids = ids
        self.answer: list[int] = []
        self.stop_reason = ""
        self.stats = GenerationStats()
        self._sampling = sampling
        self._sample = Sampler(sampling, device)

    def draw(self, logits: Tensor, stop_ids: frozenset[int], longest: int) -> None:
        """Take the next token from logits (1, V), of a model made for `longest` tokens."""
        token = self._sample(logits)
        self.answer.append(token)
        n_room = longest - len(self.ids)
        self.stop_reason = stop_reason(token, len(self.answer), self._sampling, stop_ids, n_room)


class BatchRequest:
    """Answers to several token sequences, made together in an empty cache that serves nothing else.

    A row that has stopped goes on as padding, which enters no store, window or index, until all rows have stopped.
    """

    def __init__(
        self, model: Any, cache: RetrievalCache, stop_ids: Sequence[int], on_progress: OnProgress | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.stop_ids = frozenset(stop_ids)
        self._on_progress = on_progress or (lambda progress: None)
        self._passes = Passes(model, cache)
        self._mask = torch.empty(0)  # (B, tokens so far, padding included) bool, True = token
        self._longest = 0
        self._shared = GenerationStats()
        self._drawn_at: list[float] = []  # seconds from the start to each round of tokens

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[Row]:
        """One row per prompt, in order, each ended by its own stop token, `max_new_tokens` or the longest context.

        Raises ValueError for prompts of different lengths if the model cannot leave padding out. However it ends, index
        builds under way are cancelled.
        """
        refuse_padding(self.cache, prompts)
        self._longest = longest_context(self.model.config, self.cache.config, self.model.dtype, len(prompts))
        started = time.perf_counter()
        self.cache.reset_clocks()
        rows = [Row(ids, sampling, self.model.device) for ids, sampling in zip(prompts, samplings, strict=True)]
        try:
            self._draw(rows, self._prefill(prompts), started)
            if not all(row.stop_reason for row in rows):
                self._build()
            while not all(row.stop_reason for row in rows):
                self._step(rows, started)
        finally:
            self.cache.cancel_builds()
        for i, row in enumerate(rows):
            row.stats = self._stats(i, row)
        return rows

    def _prefill(self, prompts: Sequence[list[int]]) -> Tensor:
        """Run the prompts, chunk by chunk; returns the logits (B, V) of their last tokens."""
        started, logits = time.perf_counter(), torch.empty(0)
        ids, self._mask = pad_left(prompts, self.model.device)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        n_tokens, done = sum(map(len, prompts)), 0
        self._on_progress(Progress("prefill", 0, n_tokens))
        with self.cache.working(), self.cache.exact():
            for stop in chunk_ends(ids.shape[1], self.cache.config):
                mask = self._mask[:, :stop]
                rows = {"attention_mask": mask, "position_ids": positions[:, done:stop]}
                if stop == ids.shape[1]:
                    logits = self._passes.logits(ids[:, done:stop], ids.shape[1], **rows)
                else:
                    self._passes.read(ids[:, done:stop], ids.shape[1], **rows)
                done = stop
                self._on_progress(Progress("prefill", int(mask.sum()), n_tokens))
        self._shared.prefill_s = time.perf_counter() - started
        return logits

    def _build(self) -> None:
        started = time.perf_counter()
        if self.cache.start_builds():
            follow_builds(self.cache, self._on_progress)
            self._shared.build_wait_s = time.perf_counter() - started

    def _step(self, rows: Sequence[Row], started: float) -> None:
        """One more token for every row that goes on; the others are fed padding."""
        step_started, device = time.perf_counter(), self.model.device
        going = torch.tensor([[not row.stop_reason] for row in rows], device=device)
        ids = torch.tensor([[PADDING if row.stop_reason else row.answer[-1]] for row in rows], device=device)
        positions = torch.tensor([[len(row.ids) + len(row.answer) - 1] for row in rows], device=device)
        self._mask = torch.cat([self._mask, going], dim=1)
        with self.cache.working():
            fed = {"attention_mask": self._mask, "position_ids": positions}
            self._draw(rows, self._passes.logits(ids, self._mask.shape[1], **fed), started)
        self._shared.itl_s.append(time.perf_counter() - step_started)

    def _draw(self, rows: Sequence[Row], logits: Tensor, started: float) -> None:
        for i, row in enumerate(rows):
            if not row.stop_reason:
                row.draw(logits[i : i + 1], self.stop_ids, self._longest)
        self._drawn_at.append(time.perf_counter() - started)

    def _stats(self, i: int, row: Row) -> GenerationStats:
        """Tokens, bytes and index are the row's own; seconds, and what steps found, are those of the batch."""
        n_new = len(row.answer)
        own = [layer.memories[i] for layer in self.cache.retrieval_layers]
        stats = replace(
            self._shared,
            prompt_tokens=len(row.ids),
            new_tokens=n_new,
            stop_reason=row.stop_reason,
            ttft_s=self._drawn_at[0],
            e2e_s=self._drawn_at[n_new - 1],
            itl_s=self._shared.itl_s[: n_new - 1],
            build_s=sum(memory.far_index.build_seconds for memory in own),
        )
        summarise(stats, self.cache, own, self.model.device)
        return stats


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts, not a prompt: its first item is a text, a list, or a row of ids."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    first = prompt[0]
    return first.dim() > 0 if isinstance(first, Tensor) else isinstance(first, str | list | tuple)


def sampling_per_row(options: dict[str, Any], n_rows: int) -> list[Sampling]:
    """The options of each row: the same for all, except that `seed` may be a list of one for each."""
    seeds = options.get("seed", 0)
    if not isinstance(seeds, list | tuple):
        seeds = [seeds] * n_rows
    if len(seeds) != n_rows:
        raise ValueError(f"seed must be one number, or one for each of the {n_rows} prompts, got {len(seeds)}")
    return [Sampling(**(options | {"seed": seed})) for seed in seeds]


def total_plan(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What several contexts take together."""
    return MemoryPlan(*map(sum, zip(*map(astuple, plans), strict=True)))


def pad_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, n), each row ending in its prompt, and where the prompts stand (B, n) bool; n: the longest."""
    n = max(map(len, prompts))
    ids = torch.full((len(prompts), n), PADDING)
    mask = torch.zeros((len(prompts), n), dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, n - len(prompt) :] = torch.tensor(prompt)
        mask[i, n - len(prompt) :] = True
    return ids.to(device), mask.to(device)


def refuse_padding(cache: RetrievalCache, prompts: Sequence[list[int]]) -> None:
    """Raise ValueError if padding is needed and a layer may take it in."""
    if len({len(prompt) for prompt in prompts}) > 1:
        for i, layer in enumerate(cache.layers):
            if hasattr(layer, "update_recurrent_state"):
                raise ValueError(
                    f"layer {i} of this model keeps a recurrent state, from which not every version of transformers "
                    f"keeps padding out; the prompts must be of one length, got {min(map(len, prompts))} to "
                    f"{max(map(len, prompts))} tokens: generate them one at a time"
                )
