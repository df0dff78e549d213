"""The model that ships with the package: it loads anywhere, takes any text, and finds what was planted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrieval_attn as ra
from retrieval_attn.bench.shared.facts import document
from retrieval_attn.far.estimators import FarState
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kernels import AttentionState
from retrieval_attn.llm import EMBEDDED


def _attend_to_nothing(query, *rest):
    n_heads = query.shape[1]
    return FarState(AttentionState.empty(query.shape), np.zeros((n_heads, 1)), torch.zeros(n_heads, 1))


@pytest.fixture(scope="module")
def llm():
    return ra.load(None, ra.RetrievalConfig(index="graph"))


@pytest.fixture(scope="module")
def document_8k(llm):
    return document(lambda text: len(llm.encode_text(text)), 8192, 30, seed=77)


def test_stock_transformers_loads_it_and_it_is_small():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type in ("llama", "qwen2")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 16e6


@examples(50)
@given(st.text())
def test_tokenizer_takes_any_text(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def _tokenizer():
    if not hasattr(_tokenizer, "made"):
        _tokenizer.made = AutoTokenizer.from_pretrained(EMBEDDED)
    return _tokenizer.made


@pytest.fixture(scope="module")
def has_read(llm, document_8k):
    """A session that has read the document; fork it."""
    session = llm.session()
    session.read(document_8k.text)
    return session


def test_graph_answers_from_anywhere_in_8k_tokens(llm, document_8k, has_read):
    """Every second fact, each asked of the document alone; top 100 keys per head of the far ones."""
    facts = document_8k.facts[::2]
    session = has_read.fork()
    answers, visited = [], []
    for fact in facts:
        ids = llm.encode([{"role": "user", "content": f"{document_8k.text}\n\n{fact.question}"}])
        done = session.answer(ids, max_new_tokens=16)
        answers.append(done.text.strip())
        visited.append(done.stats.visited_fraction)
    right = sum(answer == fact.answer for answer, fact in zip(answers, facts, strict=True))
    assert right >= 14, list(zip(answers, [fact.answer for fact in facts], strict=True))
    assert max(visited) < 0.6


def test_several_turns_about_one_document(document_8k, has_read):
    session = has_read.fork()
    asked = document_8k.facts[5:9]
    answers = [session.ask(fact.question, max_new_tokens=16).text.strip() for fact in asked]
    assert sum(answer == fact.answer for answer, fact in zip(answers, asked, strict=True)) >= 3


def test_without_far_keys_it_cannot_know(llm, document_8k, has_read, monkeypatch):
    """The tests above prove something: with the window alone, the same model fails."""
    session = has_read.fork()
    monkeypatch.setattr("retrieval_attn.attention.decode.attend_found", _attend_to_nothing)
    asked = document_8k.facts[:10]
    answers = []
    for fact in asked:
        ids = llm.encode([{"role": "user", "content": f"{document_8k.text}\n\n{fact.question}"}])
        session.answer(ids, max_new_tokens=1)
        # The prompt attends exactly; going back over its last token makes all of the answer depend on retrieval.
        with torch.no_grad():
            session.cache.crop(-1)
            token, answer = ids[-1], []
            for _ in range(8):
                out = llm.model(torch.tensor([[token]]), **cache_argument(session.cache))
                token = int(out.logits[0, -1].argmax())
                answer.append(token)
        session._cached = [*ids, *answer[:-1]]
        answers.append(llm.decode(answer).strip())
    right = sum(fact.answer in answer for answer, fact in zip(answers, asked, strict=True))
    assert right <= 2


def test_everything_retrieved_equals_stock_in_float32():
    config = ra.RetrievalConfig(index="graph", top_k=1 << 20, n_sink=16, n_local=64, exact_below=0)
    llm = ra.load(config=config, dtype="float32")
    text = document(lambda text: len(llm.encode_text(text)), 2048, 10, seed=5)
    ids = llm.encode([{"role": "user", "content": f"{text.text}\n\n{text.facts[4].question}"}])
    stock = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    expected = stock.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert llm.generate(ids, max_new_tokens=12).token_ids == expected
