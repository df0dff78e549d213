"""Train and measure the embedded model: a tiny Qwen2 that answers questions about facts in very long texts.

    python -m retrieval_attn.bench.train.embedded --out DIR --device cpu --seed 0 [--corpus prose.txt.xz]
    python -m retrieval_attn.bench.train.embedded --eval-only DIR --lengths 8k,32k,64k,128k --questions 100

Training goes from copying random tokens to conversations about documents of doubling length. Beyond `FULL_LIMIT`
tokens full back-propagation is too slow on a CPU; there the document runs forward once, its hidden states are kept, and
only the questions behind it (and the keys and values made from the kept states) take part in back-propagation.
A checkpoint follows each stage; the same command resumes. `--corpus` adds real prose (plain or .xz, works separated by
form feeds) to the generated filler.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from retrieval_attn.bench.shared import facts as texts

PAD, END, SYSTEM, USER, ASSISTANT = SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (' ' if message['role'] == 'assistant' else '') }}"
    "{{ message['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZATION_PY = '''"""The stock fast tokenizer, for loading with trust_remote_code; see tokenizer_config.json."""

from transformers import PreTrainedTokenizerFast

__all__ = ["PreTrainedTokenizerFast"]
'''
# Before the 1,110 groups of digits with a blank are added.
LEARNED_TOKENS = 4096
MAX_POSITIONS = 1_048_576
# Rotary pairs with wavelengths of 4 thousand to 600 thousand tokens at theta = 1e10 and head_dim = 64.
MIDDLE_PAIRS = slice(9, 17)
# Seeds below this one make held-out facts and prose; training draws from above.
FIRST_TRAINING_SEED = 1_000_000


# How byte-level BPE writes the byte of a blank.
BLANK = "Ġ"
WORD_PATTERN = r" ?\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer_sample(corpus: Sequence[str], seed: int) -> Iterator[str]:
    """Text that shows the tokenizer what it will meet: prose of both kinds, facts, questions and numbers."""
    yield texts.prose(2_000_000, seed)
    for fact in texts.make_facts(20_000, FIRST_TRAINING_SEED + seed):
        yield f"{fact.entity} {fact.value}. {fact.sentence} {fact.question} {fact.value} " * 4
        yield f"{fact.sentence}\n{fact.question}\n"
    for words in (texts.FIRST_NAMES, texts.ADJECTIVES, texts.NOUNS, texts.CITIES):
        yield f" {' '.join(words)} {' '.join(words).title()}" * 300
    for work in corpus:
        yield work[: 12_000_000 // len(corpus)]
    # Often enough that every group of one to three digits becomes one token.
    for number in range(1000):
        yield " ".join([f"{number:03d} {number % 100:02d}"] * 1000)


def train_tokenizer(corpus: Sequence[str], seed: int, out: Path) -> None:
    """Byte-level BPE in which a number is cut into groups of three digits from the left, each one token.

    The blank before a number belongs to its first group, as the blank before a word belongs to the word: so the first
    token of an answer always tells something.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN.removeprefix(" ?")), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_sample(corpus, seed), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = WORD_PATTERN
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for group in [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)]:
        vocabulary[f"{BLANK}{group}"] = len(vocabulary)
        merges.append([BLANK, group])
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    # Written by hand so that releases of transformers before and after 5.0 read it alike. Without the auto_map,
    # AutoTokenizer 5.x puts Qwen2Tokenizer, which cuts numbers into single digits, in the place of any tokenizer
    # found beside a Qwen2 model. Nothing is imported through it unless trust_remote_code is set.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "tokenization.PreTrainedTokenizerFast"]},
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "tokenization.py").write_text(TOKENIZATION_PY)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A random model with local heads in its first layer."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    plant_local_heads(model)
    silence_middle_pairs(model)
    return model


@torch.no_grad()
def plant_local_heads(model: Qwen2ForCausalLM, strength: float = 6.0) -> None:
    """Turn query head 0 of layer 0 to the previous token, and heads 1 and 3 to the last hundred, through biases alone.

    On chosen rotary pairs every key starts as (strength, 0), and every query as the same vector turned back by one
    position: the product is largest one position back. The fastest pairs tell neighbours apart. Alone they would come
    round again by chance somewhere in a long text; pairs 6 to 8 (wavelengths 500 to 2,000) keep the distant ones out.
    Pair i is made of dimensions i and i + D/2.
    """
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq.float()
    keys, queries = (_by_pair(p.bias, attention.head_dim) for p in (attention.k_proj, attention.q_proj))
    for projection in (attention.q_proj, attention.k_proj):
        weight = _by_pair(projection.weight, attention.head_dim)
        weight[0] *= 0.1
        weight[:, :, 6:9] *= 0.1
    for kv_head, pairs in ((0, slice(0, 9)), (1, slice(6, 9))):
        keys[kv_head, 0, pairs] = strength
    for head, pairs in ((0, slice(0, 9)), (1, slice(6, 9)), (3, slice(6, 9))):
        queries[head, 0, pairs] = strength * torch.cos(frequencies[pairs])
        queries[head, 1, pairs] = -strength * torch.sin(frequencies[pairs])


def _by_pair(tensor: Tensor, head_dim: int) -> Tensor:
    """A view of a projection's weight or bias as (heads, 2, D/2, ...): [:, :, i] is rotary pair i."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])


@torch.no_grad()
def silence_middle_pairs(model: Qwen2ForCausalLM) -> None:
    """Zero the rotary pairs in `MIDDLE_PAIRS` of every query and key.

    Faster pairs turn full circle many times within the training lengths and slower ones hardly move within a million
    tokens: both mean the same at any length. The pairs between them would meet new angles with each doubling.
    """
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for tensor in (projection.weight, projection.bias):
                _by_pair(tensor, layer.self_attn.head_dim)[:, :, MIDDLE_PAIRS] = 0


class Context(NamedTuple):
    """A document that ran forward already: what each layer got as input, (1, N, hidden) each, detached."""

    inputs: list[Tensor]

    @property
    def n_tokens(self) -> int:
        return self.inputs[0].shape[1]


class ShareAttention(torch.autograd.Function):
    """Attention of B rows of T queries over N shared keys and, causally, over the row's own T keys.

    The two parts run through the CPU flash kernel apart and merge by their log-sum-exp. Given the merged output and
    log-sum-exp, the kernel's backward of either part is the exact gradient of the whole.
    """

    @staticmethod
    def forward(ctx, q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        folded = fold_queries(q, shared_k.shape[1])
        far, far_lse = flash(folded, shared_k, shared_v)
        near, near_lse = flash(q, k, v, 0.0, True)
        far, far_lse = unfold_queries(far, q), unfold_queries(far_lse[..., None], q)[..., 0]
        lse = torch.logaddexp(far_lse, near_lse)
        out = far * (far_lse - lse).exp()[..., None] + near * (near_lse - lse).exp()[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, shared_k, shared_v, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, shared_k, shared_v, k, v, out, lse = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad, groups = grad.contiguous(), shared_k.shape[1]
        far = flash(
            fold_queries(grad, groups),
            fold_queries(q, groups),
            shared_k,
            shared_v,
            fold_queries(out, groups),
            fold_queries(lse[..., None], groups)[..., 0],
            0.0,
            False,
        )
        near = flash(grad, q, k, v, out, lse.contiguous(), 0.0, True)
        return unfold_queries(far[0], q) + near[0], far[1], far[2], near[1], near[2]


def fold_queries(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) to (1, G, B * H/G * T, D): all queries of a KV head in one row."""
    B, H, T, D = x.shape
    return x.view(B, groups, H // groups, T, D).transpose(0, 1).reshape(1, groups, -1, D).contiguous()


def unfold_queries(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold_queries`, for the B, H and T of `like`."""
    B, H, T, _ = like.shape
    groups = x.shape[1]
    return x.view(groups, B, H // groups, T, -1).transpose(0, 1).reshape(B, H, T, -1)


def share_attention(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ShareAttention` in plain PyTorch; the definition, and the path for other devices than the CPU."""
    B, H, T, _ = q.shape
    shared_k, shared_v = (x.repeat_interleave(H // x.shape[1], 1).expand(B, -1, -1, -1) for x in (shared_k, shared_v))
    mask = torch.ones(T, shared_k.shape[2] + T, dtype=torch.bool, device=q.device).tril(shared_k.shape[2])
    return F.scaled_dot_product_attention(q, torch.cat([shared_k, k], 2), torch.cat([shared_v, v], 2), mask)


def _heads(x: Tensor, projection: nn.Linear, head_dim: int) -> Tensor:
    B, T, _ = x.shape
    return projection(x).view(B, T, -1, head_dim).transpose(1, 2)


def attend(
    model: Qwen2ForCausalLM, layer: nn.Module, h: Tensor, shared: Tensor | None, log_weights: Tensor | None = None
) -> Tensor:
    """The attention block of one layer for rows h (B, T, hidden) that follow the shared rows (1, N, hidden), if any.

    log_weights (B, T), without shared rows only: added to the logits of each key, as if it stood there that many times.
    """
    attention, D = layer.self_attn, layer.self_attn.head_dim
    x = layer.input_layernorm(h)
    q, k, v = (_heads(x, p, D) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    before = 0 if shared is None else shared.shape[1]
    positions = torch.arange(before + h.shape[1], device=h.device)[None]
    cos, sin = (t.to(q.dtype) for t in model.model.rotary_emb(h, positions))
    q, k = apply_rotary_pos_emb(q, k, cos[:, before:], sin[:, before:])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if shared is None:
        if log_weights is not None:
            q, k, v = _weigh(q, k, v, log_weights)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=D**-0.5)[..., :D]
    else:
        y = layer.input_layernorm(shared)
        shared_k, shared_v = _heads(y, attention.k_proj, D), _heads(y, attention.v_proj, D)
        shared_k, _ = apply_rotary_pos_emb(shared_k, shared_k, cos[:, :before], sin[:, :before])
        kernel = ShareAttention.apply if q.device.type == "cpu" else share_attention
        out = kernel(q.contiguous(), shared_k.contiguous(), shared_v.contiguous(), k.contiguous(), v.contiguous())
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _weigh(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eight more dimensions, the first of which adds log_weights to the scaled logits."""
    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, 8)) for x in (q, k, v))
    # Two terms, so that the product is good to bfloat16's square.
    coarse = log_weights.to(k.dtype)
    q[..., width : width + 2] = width**0.5
    k[..., width] = coarse[:, None]
    k[..., width + 1] = (log_weights - coarse.float())[:, None].to(k.dtype)
    return q, k, v


def forward(
    model: Qwen2ForCausalLM, ids: Tensor, context: Context | None = None, log_weights: Tensor | None = None
) -> Tensor:
    """Final hidden states of rows ids (B, T), each standing right behind the context."""
    h = model.model.embed_tokens(ids)
    for i, layer in enumerate(model.model.layers):
        h = h + attend(model, layer, h, context.inputs[i] if context else None, log_weights)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.model.norm(h)


@torch.no_grad()
def read_context(model: Qwen2ForCausalLM, ids: Tensor) -> Context:
    """Run a document (1, N) forward, layer by layer; the last layer need not run."""
    h = model.model.embed_tokens(ids)
    inputs = [h]
    for layer in model.model.layers[:-1]:
        h = h + attend(model, layer, h, None)
        for piece in h.split(16_384, dim=1):
            piece += layer.mlp(layer.post_attention_layernorm(piece))
        inputs.append(h)
    return Context([x.to(torch.bfloat16) for x in inputs])


class Pool(NamedTuple):
    """Sentences as tokens, each with the white space before it: sentence i is tokens[ends[i]:ends[i + 1]]."""

    tokens: np.ndarray
    ends: np.ndarray

    def run(self, rng: np.random.Generator, n_tokens: int) -> list[np.ndarray]:
        """Neighbouring sentences from a random place, about n_tokens long."""
        first = int(rng.integers(len(self.ends) - 1))
        out, total = [], 0
        while total < n_tokens:
            sentence = self.tokens[self.ends[first] : self.ends[first + 1]]
            out.append(sentence)
            total += len(sentence)
            first = (first + 1) % (len(self.ends) - 1)
        return out


def make_pool(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str]) -> Pool:
    """Tokenize pieces that each begin with the white space between them and the piece before."""
    rows = [np.array(e.ids, dtype=np.int32) for e in tokenizer.backend_tokenizer.encode_batch(list(pieces))]
    rows = [row for row in rows if 0 < len(row) < 200]
    return Pool(np.concatenate(rows), np.cumsum([0] + [len(row) for row in rows]))


def leading_gaps(text: str) -> list[str]:
    """Sentences of text, the white space moved from behind each to before the next."""
    pieces = texts.split_sentences(text)
    gaps = [" "] + [piece[len(piece.rstrip()) :] for piece in pieces]
    return [gap + piece.rstrip() for gap, piece in zip(gaps, pieces, strict=False)]


def read_corpus(path: Path | None, n_chars: int, seed: int) -> list[str]:
    """Passages of 20,000 characters from works spread over the file, n_chars in all; none without a path."""
    if path is None:
        return []
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    works = [work for work in text.split("\f") if len(work) > 40_000]
    rng = random.Random(seed)
    return [
        work[(at := rng.randrange(len(work) - 20_000)) : at + 20_000]
        for work in rng.choices(works, k=n_chars // 20_000)
    ]


class Dialogue(NamedTuple):
    """Token ids; for each the number (from 1) of the answer it belongs to, or 0; and whether it is mere filler."""

    ids: np.ndarray
    answer: np.ndarray
    filler: np.ndarray


@dataclass
class Writer:
    """Makes training documents and dialogues straight as tokens."""

    tokenizer: PreTrainedTokenizerFast
    pools: list[Pool]
    rng: np.random.Generator

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.backend_tokenizer.encode(text).ids, dtype=np.int32)

    def facts(self, n: int) -> list[texts.Fact]:
        """Facts as in the benchmarks; one in twenty about an entity of arbitrary tokens, so that any name will do."""
        made = texts.make_facts(n, int(self.rng.integers(FIRST_TRAINING_SEED, 2**31)))
        return [self._wild(fact) if self.rng.random() < 1 / 20 else fact for fact in made]

    def _wild(self, fact: texts.Fact) -> texts.Fact:
        ids = self.rng.integers(len(SPECIALS) + 256, len(self.tokenizer), int(self.rng.integers(2, 5)))
        name = self.tokenizer.decode(ids).strip()
        if not name or name[-1] in ".?!:,":
            return fact
        return texts.Fact(
            name,
            fact.attribute,
            fact.value,
            fact.sentence.replace(fact.entity, name),
            fact.question.replace(fact.entity, name),
        )

    def filler(self, n_tokens: int) -> list[np.ndarray]:
        """Sentences from one pool, or runs from both in turn."""
        if self.rng.random() < 0.7:
            return self.pools[int(self.rng.integers(len(self.pools)))].run(self.rng, n_tokens)
        out: list[np.ndarray] = []
        while (missing := n_tokens - sum(map(len, out))) > 0:
            length = min(missing, int(self.rng.integers(200, 4000)))
            out += self.pools[int(self.rng.integers(len(self.pools)))].run(self.rng, length)
        return out

    def document(self, n_tokens: int, facts: Sequence[texts.Fact]) -> Dialogue:
        """The opening of a dialogue, at most n_tokens: user tag, filler with the facts planted anywhere."""
        planted = [self.encode(" " + fact.sentence) for fact in facts]
        room = n_tokens - sum(map(len, planted)) - 1
        pieces = self.filler(room) if room > 0 else []
        while pieces and sum(map(len, pieces)) > room:
            pieces.pop()
        for place, fact in zip(sorted(self.rng.integers(0, len(pieces) + 1, len(planted)))[::-1], planted, strict=True):
            pieces.insert(int(place), fact)
        ids = np.concatenate([self.encode(USER), *pieces])
        secret = {id(fact) for fact in planted}
        filler = np.repeat(
            [False] + [id(piece) not in secret for piece in pieces], [1] + [len(piece) for piece in pieces]
        )
        return Dialogue(ids, np.zeros(len(ids), dtype=np.int64), filler)

    def turn(self, fact: texts.Fact, first: bool) -> Dialogue:
        """A question and its answer, as the chat template writes them; the first ends the document's message."""
        asked = self.encode(("\n\n" if first else USER) + fact.question + END + ASSISTANT)
        answer = self.encode(" " + fact.answer + END)
        ids = np.concatenate([asked, answer])
        return Dialogue(ids, np.repeat([0, 1], [len(asked), len(answer)]), np.zeros(len(ids), dtype=bool))

    def turns(self, facts: Sequence[texts.Fact], n_tokens: int) -> Dialogue:
        """Turns one after another, as many as fit into n_tokens; at least one."""
        ids, answer, total = [], [], 0
        for i, fact in enumerate(facts):
            turn = self.turn(fact, first=i == 0)
            total += len(turn.ids)
            if i and total > n_tokens:
                break
            ids.append(turn.ids)
            answer.append(turn.answer * (i + 1))
        return Dialogue(np.concatenate(ids), np.concatenate(answer), np.zeros(sum(map(len, ids)), dtype=bool))

    def dialogue(self, n_tokens: int) -> Dialogue:
        """Exactly n_tokens: sometimes a system message, a document with facts, turns about some of them."""
        most = min(400, max(3, n_tokens // 40))
        n_facts = int(self.rng.integers(max(2, most // int(self.rng.choice([2, 2, 8]))), most + 1))
        facts = self.facts(n_facts)
        asked = [facts[i] for i in self.rng.permutation(n_facts)]
        turns = self.turns(asked, min(n_tokens * 9 // 20, 2000))
        head = self.encode(SYSTEM + "Answer from the text." + END) if self.rng.random() < 0.1 else self.encode("")
        while True:
            room = n_tokens - len(turns.ids) - len(head)
            body = self.document(room, facts)
            if len(body.ids) <= room:
                break
            facts = [fact for fact in facts if fact is not next(f for f in reversed(facts) if f not in asked[:1])]
            kept = [fact for fact in asked if fact in facts]
            turns = self.turns(kept, len(turns.ids) - 1)
        # The last filler sentence did not fit: fill up with the start of another one.
        missing = room - len(body.ids)
        pad = np.resize(self.filler(missing)[0], missing) if missing else self.encode("")
        body = Dialogue(
            *(np.concatenate([x[:1], np.full(missing, y), x[1:]]) for x, y in zip(body, (0, 0, True), strict=True))
        )
        body.ids[1 : 1 + missing] = pad
        opening = Dialogue(head, np.zeros(len(head), dtype=np.int64), np.zeros(len(head), dtype=bool))
        return Dialogue(*(np.concatenate(parts) for parts in zip(opening, body, turns, strict=True)))

    def repeats(self, n_tokens: int) -> Dialogue:
        """Random tokens, repeated with a random period; every repeated token counts as an answer."""
        period = int(self.rng.integers(4, 22))
        ids = np.resize(self.rng.integers(len(SPECIALS), len(self.tokenizer), period), n_tokens)
        answer = np.where(np.arange(n_tokens) < period + 1, 0, np.arange(n_tokens))
        return Dialogue(ids, answer, np.zeros(n_tokens, dtype=bool))


class Batch(NamedTuple):
    """ids, answer and filler (B, T) of `Dialogue`s, shorter rows ending in padding."""

    ids: Tensor
    answer: Tensor
    filler: Tensor


def stack(dialogues: Sequence[Dialogue], device: str) -> Batch:
    width = max(len(d.ids) for d in dialogues)
    columns = ([np.pad(part, (0, width - len(part))) for part in parts] for parts in zip(*dialogues, strict=True))
    ids, answer, filler = (torch.from_numpy(np.stack(rows)).to(device) for rows in columns)
    return Batch(ids.long(), answer.long(), filler)


class Score(NamedTuple):
    """loss for back-propagation; right: one bool per answer, true if every token of it was the likeliest."""

    loss: Tensor
    right: Tensor


def score(
    model: Qwen2ForCausalLM,
    batch: Batch,
    context: Context | None = None,
    prose_weight: float = 0.0,
    dilution: float = 1.0,
) -> Score:
    """Cross-entropy on the answers, and with prose_weight on a sample of the other tokens.

    With dilution each row counts its filler up to that many times, to train for longer documents than the row's.

    An answer is right exactly when greedy decoding would give it, its end included.
    """
    log_weights = None
    if dilution > 1:
        log_weights = batch.filler * torch.rand(len(batch.ids), 1, device=batch.ids.device) * math.log(dilution)
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        h = forward(model, batch.ids, context, log_weights)[:, :-1]
    targets, answer = batch.ids[:, 1:], batch.answer[:, 1:]
    rows = answer > 0
    logits = model.lm_head(h[rows].float())
    loss = F.cross_entropy(logits, targets[rows])
    hits = logits.argmax(-1) == targets[rows]
    names = (torch.arange(len(rows), device=rows.device)[:, None] * (answer.max() + 1) + answer)[rows]
    _, group = names.unique(return_inverse=True)
    wrong = torch.zeros(int(group.max()) + 1, device=rows.device).index_add_(0, group, (~hits).float())
    if prose_weight:
        others = (answer == 0).flatten().nonzero()[:, 0]
        others = others[torch.randperm(len(others), device=others.device)[:1024]]
        prose = F.cross_entropy(model.lm_head(h.flatten(0, 1)[others].float()), targets.flatten()[others])
        loss = loss + prose_weight * prose
    return Score(loss, wrong == 0)


@dataclass(frozen=True)
class Stage:
    """Train at one length until the moving accuracy passes `goal` (and at least `min_steps`) or `max_steps` are done.

    kind: "repeats" (random tokens), "dialogue" (full back-propagation), "context" (through the questions only). forms:
    the share of dialogues in the words of RULER, SCBench and needle tests, see train_forms.py.
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
    from retrieval_attn.bench.train.forms import Forms

    other = Forms(writer)
    # No number is drawn without need: stages without forms go as they always went.
    return lambda n: (other if forms and writer.rng.random() < forms else writer).dialogue(n)


def plain_batches(writer: Writer, stage: Stage, device: str) -> Iterator[tuple[Batch, Context | None]]:
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


def make_pools(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[str], seed: int) -> list[Pool]:
    """Generated prose, and real prose if there is any."""
    made = leading_gaps(texts.prose(4_000_000, FIRST_TRAINING_SEED + seed))
    pools = [make_pool(tokenizer, made)]
    if corpus:
        pools.append(make_pool(tokenizer, [piece for work in corpus for piece in leading_gaps(work)]))
    return pools


def train(out: Path, device: str, seed: int, corpus_path: Path | None) -> None:
    """Run all stages, resuming behind the last checkpoint in out/checkpoints; export the model into out."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    log = (out / "train.log").open("a")

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    start = time.time()
    corpus = read_corpus(corpus_path, 24_000_000, seed)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(corpus, seed, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    pools = make_pools(tokenizer, corpus, seed)
    sizes = [len(pool.tokens) for pool in pools]
    say(f"seed {seed} vocabulary {len(tokenizer)} prose tokens {sizes} {time.time() - start:.0f} s")
    model = new_model(tokenizer, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for number, stage in enumerate(STAGES):
        path = checkpoints / f"{number:02d}-{stage.name}.pt"
        if path.exists():
            state = torch.load(path, map_location=device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            continue
        torch.manual_seed(seed + number)
        writer = Writer(tokenizer, pools, np.random.default_rng([seed, number]))
        run_stage(model, optimizer, writer, stage, device, say)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        export(model, out)
    say(f"trained in {time.time() - start:.0f} s")


def export(model: Qwen2ForCausalLM, out: Path) -> None:
    """Save rounded to bfloat16 in the transformers layout, ready for `from_pretrained`."""
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    copy.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Releases before 5.0 look for rope_theta here.
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
    shares = [[] for _ in model.model.layers]
    for fact in doc.facts:
        turn = writer.turn(fact, first=True)
        h = model.model.embed_tokens(torch.from_numpy(turn.ids[: int(np.argmax(turn.answer))].astype(np.int64))[None])
        for i, layer in enumerate(model.model.layers):
            shared = context.inputs[i].float()
            shares[i].append(_top_share(model, layer, torch.cat([shared, h], 1), top))
            h = h + attend(model, layer, h, shared)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
    return [[round(float(x), 4) for x in np.mean(rows, 0)] for rows in shares]


def _top_share(model: Qwen2ForCausalLM, layer: nn.Module, h: Tensor, top: int) -> np.ndarray:
    attention, x = layer.self_attn, layer.input_layernorm(h)
    q, k = _heads(x[:, -1:], attention.q_proj, attention.head_dim), _heads(x, attention.k_proj, attention.head_dim)
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


def _length(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for tokenizer, checkpoints and model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="real prose to train on, .txt or .txt.xz")
    parser.add_argument("--eval-only", type=Path, metavar="DIR", help="measure the model in DIR instead of training")
    parser.add_argument("--lengths", default="8k,32k,64k,128k")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="texts to use as filler in measurements")
    args = parser.parse_args()
    if args.eval_only:
        lengths = [_length(part) for part in args.lengths.split(",")]
        evaluate(args.eval_only, lengths, args.questions, args.books, args.device, args.seed)
    elif args.out:
        train(args.out, args.device, args.seed, args.corpus)
    else:
        parser.error("one of --out and --eval-only is needed")


if __name__ == "__main__":
    main()
