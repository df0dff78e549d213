"""The stages of training, from copying random tokens to questions about documents of 64K tokens."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import Qwen2ForCausalLM

from retrieval_attn.bench.train.dialogues import Batch, Dialogue, Writer, stack
from retrieval_attn.bench.train.forms import Forms
from retrieval_attn.bench.train.model import read_context, silence_middle_pairs
from retrieval_attn.bench.train.score import score
from retrieval_attn.bench.train.shared_context import Context


@dataclass(frozen=True)
class Stage:
    """Train at one length until the moving accuracy passes `goal` (and at least `min_steps`) or `max_steps` are done.

    kind: "repeats" (random tokens), "dialogue" (full back-propagation), "context" (through the questions only). forms:
    the share of dialogues in the words of RULER, SCBench and needle tests, see forms.py.
    """

    kind: str
    length: int
    lr: float
    goal: float
    min_steps: int
    max_steps: int
    tokens_per_step: int = 8192
    dilution: float = 1.0
    forms: float = 0.0

    @property
    def name(self) -> str:
        diluted = f"-diluted-{self.dilution:.0f}" if self.dilution > 1 else ""
        return f"{'forms-' if self.forms else ''}{self.kind}-{self.length}{diluted}"


STAGES = (
    Stage("repeats", 64, 1.5e-3, 0.96, 150, 900),
    Stage("dialogue", 128, 1.5e-3, 0.95, 60, 900),
    Stage("dialogue", 256, 1e-3, 0.94, 60, 200),
    Stage("dialogue", 512, 1e-3, 0.92, 40, 200),
    Stage("dialogue", 1024, 1.2e-3, 0.985, 100, 300),
    Stage("dialogue", 2048, 8e-4, 0.96, 30, 60),
    Stage("dialogue", 8192, 6e-4, 0.985, 40, 80),
    Stage("dialogue", 8192, 6e-4, 0.97, 80, 80, dilution=16.0),
    Stage("dialogue", 4096, 1e-3, 0.99, 200, 240, dilution=32.0),
    Stage("context", 65536, 3e-4, 0.995, 24, 24, dilution=64.0),
    Stage("dialogue", 384, 1.2e-3, 1.0, 500, 500, 4096, forms=0.8),
    Stage("dialogue", 1024, 8e-4, 1.0, 160, 160, 4096, dilution=4.0, forms=0.8),
    Stage("dialogue", 4096, 7e-4, 1.0, 410, 410, 4096, dilution=20.0, forms=0.8),
    Stage("dialogue", 512, 1.2e-3, 1.0, 200, 200, 4096, forms=0.8),
    Stage("dialogue", 2048, 1e-3, 1.0, 260, 260, 4096, dilution=8.0, forms=0.8),
    Stage("dialogue", 4096, 7e-4, 1.0, 140, 140, 4096, dilution=20.0, forms=0.8),
    Stage("context", 65536, 4e-4, 1.0, 32, 32, dilution=24.0, forms=0.7),
)
PROSE_WEIGHT = 0.05

# A stage ends with the running mean of its weights: the effect of a lower learning rate without the wait.
AVERAGING = 0.04

# Optimiser steps taken on one document before it is read anew, and questions per step.
STEPS_PER_CONTEXT = 8
QUESTIONS_PER_STEP = 48


def context_batches(
    model: Qwen2ForCausalLM, writer: Writer, stage: Stage, device: str
) -> Iterator[tuple[Batch, Context | None]]:
    """Question batches behind long documents; between them, one full dialogue of 4K tokens for each two."""
    make = dialogues(writer, stage.forms)
    while True:
        facts = writer.facts(int(writer.rng.integers(50, 300)))
        ids = torch.from_numpy(writer.document(stage.length, facts).ids.astype(np.int64))[None].to(device)
        with torch.autocast(device, torch.bfloat16):
            context = read_context(model, ids)
        for step in range(STEPS_PER_CONTEXT):
            chosen = [facts[i] for i in writer.rng.permutation(len(facts))[:QUESTIONS_PER_STEP]]
            per_row = int(writer.rng.choice([1, 1, 2, 3]))
            rows = [chosen[i : i + per_row] for i in range(0, len(chosen), per_row)]
            yield stack([writer.turns(row, 10**9) for row in rows], device), context
            if step % 2:
                yield stack([make(4096)], device), None


def dialogues(writer: Writer, forms: float) -> Callable[[int], Dialogue]:
    """Makes dialogues of a length, this share of them in the forms of the benchmarks."""

    other = Forms(writer)
    # No number is drawn without need: stages without forms go as they always went.
    return lambda n: (other if forms and writer.rng.random() < forms else writer).dialogue(n)


def plain_batches(writer: Writer, stage: Stage, device: str) -> Iterator[tuple[Batch, Context | None]]:
    """Rows of dialogues, or of repeats, each on its own."""
    make = writer.repeats if stage.kind == "repeats" else dialogues(writer, stage.forms)
    while True:
        yield stack([make(stage.length) for _ in range(max(1, stage.tokens_per_step // stage.length))], device), None


def run_stage(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    writer: Writer,
    stage: Stage,
    device: str,
    say: Callable[[str], None],
) -> None:
    """One stage of the plan, from warm-up to its goal."""
    long = stage.kind == "context"
    batches = context_batches(model, writer, stage, device) if long else plain_batches(writer, stage, device)
    recent: deque[float] = deque(maxlen=16)
    parameters = list(model.parameters())
    silence_middle_pairs(model)
    average = [p.detach().clone() for p in parameters]
    start = time.time()
    step = 0
    while step < stage.max_steps:
        batch, context = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min((step + 1) / 20, 1 - 0.9 * step / stage.max_steps)
        plain = stage.kind != "repeats" and context is None
        result = score(model, batch, context, PROSE_WEIGHT if plain else 0.0, stage.dilution if plain else 1.0)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        silence_middle_pairs(model)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], AVERAGING)
        if long and context is None:
            continue
        step += 1
        recent.append(result.right.float().mean().item())
        if step % (4 if long else 10) == 0 or step == 1:
            seconds = time.time() - start
            say(f"{stage.name} step {step} loss {result.loss.item():.3f} right {np.mean(recent):.3f} {seconds:.0f} s")
        if step >= stage.min_steps and np.mean(recent) >= stage.goal:
            break
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    say(f"{stage.name} done: step {step} right {np.mean(recent):.3f} {time.time() - start:.0f} s")
