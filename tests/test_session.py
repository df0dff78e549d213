"""Sessions: many turns, nothing re-run, nothing lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import save_tiny_chat_model
from transformers import AutoModelForCausalLM

import retrieval_attn as ra

EVERYTHING = 1 << 20
CONFIG = ra.RetrievalConfig(index="exact", top_k=EVERYTHING, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 8


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llm(folder):
    return ra.load(folder, CONFIG, dtype="float32")


def stock_answer(folder, ids, n):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, len(ids) :].tolist()


def forward_lengths(llm):
    """Record how many tokens each forward pass runs."""
    lengths = []
    handle = llm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths, handle


def test_three_turns_equal_stock_on_the_same_ids(llm, folder):
    session = llm.session()
    for question in (TEXT + "How many?", "And how many boats?", "Sure?"):
        done = session.ask(question, max_new_tokens=10)
        asked = session.token_ids[: -len(done.token_ids)]
        assert done.token_ids == stock_answer(folder, asked, 10)
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 3


def test_a_turn_runs_only_its_own_tokens(llm):
    session = llm.session()
    session.ask(TEXT + "How many?", max_new_tokens=5)
    before = len(session.token_ids)
    lengths, handle = forward_lengths(llm)
    done = session.ask("And now?", max_new_tokens=3)
    handle.remove()
    new_prompt = len(session.token_ids) - len(done.token_ids) - before
    # The last token of the answer before was sampled, but never run.
    assert sum(lengths) == new_prompt + 1 + 2
    assert done.stats.reused_tokens == before - 1


def test_template_text_of_a_second_turn(llm):
    session = llm.session("Be brief.")
    session.ask("One", max_new_tokens=2)
    session.token_ids = session.token_ids[:-2] + llm.encode_text("ok")
    session._cached = session._cached[: len(session.token_ids) - 2]
    session.cache.crop(len(session._cached) - session.cache.get_seq_length())
    session.ask("Two", max_new_tokens=1)
    text = llm.tokenizer.decode(session.token_ids[:-1])
    assert text == ("<|system|>Be brief.<|end|><|user|>One<|end|><|assistant|>ok<|end|><|user|>Two<|end|><|assistant|>")


def test_read_then_ask_equals_asking_with_the_text(llm):
    session = llm.session()
    session.read(TEXT)
    lengths, handle = forward_lengths(llm)
    done = session.ask("How many?", max_new_tokens=8)
    handle.remove()
    assert max(lengths) < 40
    assert done.token_ids == llm.generate(session.token_ids[: -len(done.token_ids)], max_new_tokens=8).token_ids
    assert llm.tokenizer.decode(session.token_ids).startswith("<|user|>" + TEXT + "\n\nHow many?<|end|><|assistant|>")
    assert session.token_ids[: len(done.token_ids) * -1] == llm.encode(session.messages[:1])
    assert session.messages[0] == {"role": "user", "content": TEXT + "\n\nHow many?"}


def test_regenerate_gives_the_same_greedy_answer(llm):
    session = llm.session()
    first = session.ask(TEXT + "How many?", max_new_tokens=12)
    again = "".join(session.regenerate(max_new_tokens=12))
    assert again == first.text
    assert session.last.token_ids == first.token_ids
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_interrupted_prefill_keeps_what_was_run(llm, monkeypatch):
    session = llm.session()
    forward, calls = type(llm.model.model).forward, []

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(llm.model.model), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask(TEXT + "How many?", max_new_tokens=5)
    monkeypatch.undo()
    assert session.messages == []
    assert session.token_ids == []
    done = session.ask(TEXT + "How many?", max_new_tokens=5)
    assert done.stats.reused_tokens == 150
    assert done.token_ids == llm.session().ask(TEXT + "How many?", max_new_tokens=5).token_ids


def test_interrupted_answer_keeps_the_conversation(llm):
    session = llm.session()
    stream = session.stream(TEXT + "How many?", max_new_tokens=50)
    for _ in range(5):
        next(stream)
    stream.close()
    assert session.messages[-1]["role"] == "assistant"
    assert len(session.last.token_ids) >= 5
    done = session.ask("And now?", max_new_tokens=6)
    fresh = llm.generate(session.token_ids[: -len(done.token_ids)], max_new_tokens=6)
    assert done.token_ids == fresh.token_ids


def test_edited_history_reuses_the_common_prefix(llm):
    session = llm.session()
    ids = llm.encode(TEXT)
    session.answer(ids, max_new_tokens=4)
    edited = [*ids[:200], *llm.encode_text(" Otherwise!")]
    done = session.answer(edited, max_new_tokens=6)
    assert done.stats.reused_tokens == 200
    assert done.token_ids == llm.generate(edited, max_new_tokens=6).token_ids


def test_prompt_shorter_than_the_cache(llm):
    """A prompt no longer than the cache was appended whole by transformers 5.3 and later; ours goes back first."""
    session = llm.session()
    ids = llm.encode(TEXT)
    first = session.answer(ids, max_new_tokens=4)
    assert session.answer(ids, max_new_tokens=4).token_ids == first.token_ids
    assert session.cache.get_seq_length() == len(ids) + 3


def test_model_without_chat_template_continues_text(tmp_path):
    folder = save_tiny_chat_model(tmp_path / "plain", chat_template=None)
    llm = ra.load(folder, CONFIG, dtype="float32")
    session = llm.session()
    done = session.ask(TEXT, max_new_tokens=4)
    session.ask(" More.", max_new_tokens=4)
    assert session.token_ids[: len(llm.encode(TEXT)) + 4] == llm.encode(TEXT) + done.token_ids
    with pytest.raises(ValueError, match="no chat template"):
        llm.generate([{"role": "user", "content": "hello"}])


def test_two_sessions_in_two_threads_give_what_they_give_alone(llm):
    texts = [TEXT + "How many?", "Another text altogether. " * 12]
    alone = [llm.session().ask(text, max_new_tokens=8).token_ids for text in texts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda text: llm.session().ask(text, max_new_tokens=8).token_ids, texts))
    assert together == alone


def test_a_restored_session_makes_one_cache(llm, tmp_path, monkeypatch):
    session = llm.session()
    session.ask("Hello", max_new_tokens=1)
    session.save(tmp_path / "saved")
    made, new_cache = [], llm.new_cache
    monkeypatch.setattr(llm, "new_cache", lambda: made.append(new_cache()) or made[-1])
    restored = llm.restore(tmp_path / "saved")
    assert made == [restored.cache]
    assert restored.token_ids == session.token_ids
