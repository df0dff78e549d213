"""How often the model answers right about documents of any length, and how peaked its attention is."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from retrieval_attn.bench.shared import facts as texts
from retrieval_attn.bench.train.dialogues import Writer, stack
from retrieval_attn.bench.train.model import attend, project_heads, read_context
from retrieval_attn.bench.train.score import score
from retrieval_attn.bench.train.tokenizer import USER


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered exactly, each asked first after the document; and by thirds of depth."""

    n_tokens: int
    filler: str
    questions: int
    right: float
    by_depth: tuple[float, ...]
    seconds: float


@torch.no_grad()
def measure(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    n_tokens: int,
    questions: int,
    filler: str | None,
    name: str,
    seed: int,
) -> Accuracy:
    """Ask about every fact of one document with as many facts as questions."""
    start = time.time()
    device = model.device.type

    def count(text: str) -> int:
        return len(tokenizer.backend_tokenizer.encode(text).ids)

    doc = texts.document(count, n_tokens, questions, seed, filler)
    writer = Writer(tokenizer, [], np.random.default_rng(seed))
    ids = torch.from_numpy(writer.encode(USER + doc.text).astype(np.int64))[None].to(device)
    right: list[bool] = []
    with torch.autocast(device, torch.bfloat16):
        context = read_context(model, ids)
    for i in range(0, questions, 50):
        batch = stack([writer.turn(fact, first=True) for fact in doc.facts[i : i + 50]], device)
        right += score(model, batch, context).right.tolist()
    thirds = tuple(float(np.mean(part)) for part in np.array_split(np.array(right), 3))
    return Accuracy(ids.shape[1], name, questions, float(np.mean(right)), thirds, time.time() - start)


@torch.no_grad()
def attention_mass(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, n_tokens: int, top: int, seed: int
) -> list[list[float]]:
    """Mean share of the softmax mass in the `top` largest of n_tokens keys, by layer and head.

    Taken at the last token before each of 50 answers.
    """
    writer = Writer(tokenizer, [], np.random.default_rng(seed))
    doc = texts.document(lambda text: len(writer.encode(text)), n_tokens, 50, seed)
    context = read_context(model, torch.from_numpy(writer.encode(USER + doc.text).astype(np.int64))[None])
    shares: list[list[np.ndarray]] = [[] for _ in model.model.layers]
    for fact in doc.facts:
        turn = writer.turn(fact, first=True)
        h = model.model.embed_tokens(torch.from_numpy(turn.ids[: int(np.argmax(turn.answer))].astype(np.int64))[None])
        for i, layer in enumerate(model.model.layers):
            shared = context.inputs[i].float()
            shares[i].append(_top_share(model, layer, torch.cat([shared, h], 1), top))
            h = h + attend(model, layer, h, shared)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
    return [[round(float(x), 4) for x in np.mean(rows, 0)] for rows in shares]


def _top_share(model: Qwen2ForCausalLM, layer: Any, h: Tensor, top: int) -> np.ndarray:
    attention, x = layer.self_attn, layer.input_layernorm(h)
    q = project_heads(x[:, -1:], attention.q_proj, attention.head_dim)
    k = project_heads(x, attention.k_proj, attention.head_dim)
    cos, sin = model.model.rotary_emb(h, torch.arange(h.shape[1])[None])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / math.sqrt(attention.head_dim)
    return logits.softmax(-1)[0, :, 0].topk(top).values.sum(-1).numpy()


def evaluate(
    folder: Path, lengths: Sequence[int], questions: int, books: Sequence[Path], device: str, seed: int
) -> None:
    """Print accuracy at each length with generated and, if books are given, real prose around the facts; then JSON."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fillers = {"generated": None, **{book.stem: book.read_text(encoding="utf-8") for book in books}}
    rows = []
    print("| tokens | filler | questions | right | first, second, last third | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n_tokens in lengths:
        for name, filler in fillers.items():
            row = measure(model, tokenizer, n_tokens, questions, filler, name, seed)
            depths = ", ".join(f"{x:.2f}" for x in row.by_depth)
            print(
                f"| {row.n_tokens:,} | {name} | {questions} | {row.right:.1%} | {depths} | {row.seconds:.0f} |",
                flush=True,
            )
            rows.append(asdict(row))
    mass = attention_mass(model.cpu(), tokenizer, 16_384, 100, seed)
    print(json.dumps({"accuracy": rows, "top_100_mass_of_16k_keys": mass}))
