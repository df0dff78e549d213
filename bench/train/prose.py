"""Sentences as tokens: the filler of training documents, generated or from a corpus."""

import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from retrieval_attn.bench.shared import facts as texts
from retrieval_attn.bench.train.tokenizer import FIRST_TRAINING_SEED


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


def make_pools(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[str], seed: int) -> list[Pool]:
    """Generated prose, and real prose if there is any."""
    made = leading_gaps(texts.prose(4_000_000, FIRST_TRAINING_SEED + seed))
    pools = [make_pool(tokenizer, made)]
    if corpus:
        pools.append(make_pool(tokenizer, [piece for work in corpus for piece in leading_gaps(work)]))
    return pools
