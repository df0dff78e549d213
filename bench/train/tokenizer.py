"""The embedded model's tokenizer: byte-level BPE in which numbers are groups of three digits, and its chat template."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
