"""Real checkpoints from GGUF files answer as stock transformers does with the same file."""

import pytest
import torch
from real_models import GEMMA3, SMOLLM2, needs
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrieval_attn as ra
from retrieval_attn.hf.versions import READS_GGUF

pytestmark = pytest.mark.skipif(not READS_GGUF, reason="this transformers is refused for GGUF files")

# All keys are found, from few that are near.
ALL = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=200)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = (
    "The lighthouse keeper counts the ships that pass in the night. When the fog lies on the water she rings the old "
    "bell, once for every ship that she can hear, and writes their number into a book. Her brother reads the book in "
    "spring and counts once more. This year the two numbers did not agree, and so "
)


@needs(SMOLLM2)
def test_a_real_chat_model_answers_from_its_file():
    """Its own template, tokens and weights: with a second BOS it answers in French."""
    llm = ra.load(SMOLLM2.path, ALL)
    ids = llm.encode(QUESTION)
    done = llm.generate(QUESTION, max_new_tokens=30)
    assert "Paris" in done.text
    llm.model.set_attn_implementation("sdpa")
    stock = llm.model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()
    assert done.token_ids == stock


@pytest.mark.long
@pytest.mark.parametrize("real", [pytest.param(one, marks=needs(one), id=one.name) for one in (SMOLLM2, GEMMA3)])
def test_two_hundred_tokens_equal_stock(real, monkeypatch):
    """Loaded by transformers' own calls, tokenizer and all; Gemma's sliding layers lose tokens meanwhile."""
    options = {"gguf_file": real.path.name}
    tokenizer = AutoTokenizer.from_pretrained(real.path.parent, **options)
    prompt = TEXT * 8
    ids = tokenizer(prompt)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(real.path.parent, dtype="float32", **options)
    model.generation_config.eos_token_id = None
    stock = model.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :].tolist()
    llm = ra.load(real.path, ALL, dtype="float32")
    assert llm.encode(prompt) == ids
    for text in ("née 12345\n\n  def f(x):\treturn 北京 🙂", "<|im_start|>user\n", "<start_of_turn>"):
        assert llm.encode(text) == tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id in llm.stop_ids()
    # All of the 200.
    monkeypatch.setattr(llm, "stop_ids", list)
    assert llm.generate(prompt, max_new_tokens=200).token_ids == stock


@pytest.mark.long
@needs(GEMMA3)
def test_gemma_reads_a_document_once(monkeypatch):
    """Fifteen of its 18 layers have a window of 512, which the text has left behind."""
    llm = ra.load(GEMMA3.path, ALL, dtype="float32")
    monkeypatch.setattr(llm, "stop_ids", list)
    session = llm.session()
    session.read(TEXT * 12)
    document = session.token_ids
    assert len(document) > 700
    for question in ("How many ships did she count?", "Who reads the book, and when?"):
        ids = document + llm.encode_text(question)
        done = session.answer(ids, max_new_tokens=20)
        assert done.stats.reused_tokens >= len(document)
        assert done.token_ids == llm.generate(ids, max_new_tokens=20).token_ids
        for _ in session.regenerate(max_new_tokens=20):
            pass
        assert session.last.token_ids == done.token_ids
        assert session.last.stats.reused_tokens == len(ids) - 1
