"""Training dialogues in the forms of the benchmarks: every answer stands in the text, and is told apart from it."""

import numpy as np
import pytest
from laws import rarely
from transformers import AutoTokenizer

from retrieval_attn.bench.train.dialogues import Writer
from retrieval_attn.bench.train.forms import FORMS, Forms
from retrieval_attn.bench.train.prose import make_pools
from retrieval_attn.bench.train.stages import STAGES, Stage, plain_batches
from retrieval_attn.bench.train.tokenizer import ASSISTANT, END, USER
from retrieval_attn.llm import EMBEDDED


@pytest.fixture(scope="module")
def parts():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return tokenizer, make_pools(tokenizer, [], 0)


@pytest.mark.parametrize("form", sorted({form.__name__ for form in FORMS}))
@pytest.mark.parametrize("n_tokens", [300, *rarely(2000)])
def test_answers_stand_in_the_text_and_are_marked(parts, form, n_tokens):
    tokenizer, pools = parts
    for seed in range(6):
        forms = Forms(Writer(tokenizer, pools, np.random.default_rng(seed)))
        dialogue = forms._written(getattr(forms, form)(n_tokens), n_tokens)
        assert len(dialogue.ids) == len(dialogue.answer) == len(dialogue.filler)
        assert len(dialogue.ids) < 2.2 * n_tokens + 300
        text = tokenizer.decode(dialogue.ids[dialogue.answer == 0])
        document = text.split(END)[0]
        assert text.startswith(USER)
        for number in range(1, dialogue.answer.max() + 1):
            at = np.flatnonzero(dialogue.answer == number)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            answer = tokenizer.decode(dialogue.ids[at])
            assert answer.endswith(END)
            assert all(part.strip() in document for part in answer.removesuffix(END).split(","))
            assert ASSISTANT in tokenizer.decode(dialogue.ids[max(0, at[0] - 150) : at[0]])
        # What is asked for is not filler, or it would count many times.
        assert 0 < dialogue.filler.mean() < 1
        assert not dialogue.filler[dialogue.answer > 0].any()


def test_the_text_is_tokenized_as_a_whole_would_be(parts):
    """Pieces begin with their white space: put together, their ids are those of the text that a reader has, but for
    where one line break meets another."""
    tokenizer, pools = parts
    breaks = {i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip()}
    for seed in range(12):
        forms = Forms(Writer(tokenizer, pools, np.random.default_rng(seed)))
        ids = forms.dialogue(800).ids.tolist()
        whole = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        assert [i for i in ids if i not in breaks] == [i for i in whole if i not in breaks]


def test_stages_of_forms_mix_in_the_old_kind(parts):
    tokenizer, pools = parts
    writer = Writer(tokenizer, pools, np.random.default_rng(0))
    batches = plain_batches(writer, Stage("dialogue", 256, 1e-3, 1.0, 1, 1, 2048, forms=0.8), "cpu")
    texts = [tokenizer.decode(row) for _, (batch, _) in zip(range(6), batches, strict=False) for row in batch.ids]
    published = ("special magic", "JSON object", "pass key", "high-quality answer")
    known = [any(words in text for words in published) for text in texts]
    assert 0.5 < np.mean(known) < 1
    assert [stage.forms > 0 for stage in STAGES] == [False] * 10 + [True] * 7
