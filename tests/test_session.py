"""Sessions: many turns, nothing re-run, nothing lost, saved and restored."""

import dataclasses
import json
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


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("index", ["exact", "ivf", "graph"])
def test_save_then_restore_gives_the_same_tokens(tmp_path, kind, index):
    """Law 5. Few keys are retrieved, so that the restored index must find the same ones."""
    config = ra.RetrievalConfig(index=index, top_k=8, n_sink=4, n_local=16, exact_below=0)
    llm = ra.load(save_tiny_chat_model(tmp_path / "model", kind), config, dtype="float32")
    session = llm.session("Be brief.")
    session.ask(TEXT + "How many?", max_new_tokens=5)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    assert restored.messages == session.messages
    ours, theirs = (s.ask("And now?", max_new_tokens=20) for s in (session, restored))
    assert theirs.token_ids == ours.token_ids
    assert theirs.stats.reused_tokens == ours.stats.reused_tokens > 0


def test_save_replaces_an_older_session_and_nothing_else(llm, tmp_path):
    session = llm.session()
    session.ask("One", max_new_tokens=2)
    session.save(tmp_path / "saved")
    session.ask("Two", max_new_tokens=2)
    session.save(tmp_path / "saved")
    assert len(llm.restore(tmp_path / "saved").messages) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not a saved session"):
        session.save(tmp_path / "mine")


class TestRestoreRefuses:
    @pytest.fixture
    def saved(self, llm, tmp_path):
        session = llm.session()
        session.ask(TEXT, max_new_tokens=3)
        session.save(tmp_path / "saved")
        return tmp_path / "saved"

    def test_nothing_there(self, llm, tmp_path):
        with pytest.raises(FileNotFoundError, match="no saved session"):
            llm.restore(tmp_path / "nothing")

    def test_another_model(self, saved, tmp_path):
        other = ra.load(save_tiny_chat_model(tmp_path / "other", "qwen2"), CONFIG, dtype="float32")
        with pytest.raises(ValueError, match="another model"):
            other.restore(saved)

    def test_a_missing_file(self, llm, saved):
        (saved / "layer-001.safetensors").unlink()
        with pytest.raises(ValueError, match=r"incomplete: layer-001.safetensors is missing"):
            llm.restore(saved)

    def test_a_truncated_file(self, llm, saved):
        path = saved / "layer-001.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match="damaged"):
            llm.restore(saved)

    def test_a_damaged_manifest(self, llm, saved):
        (saved / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match="damaged"):
            llm.restore(saved)

    def test_other_options_that_decide_what_is_stored(self, saved, folder):
        other = ra.load(folder, dataclasses.replace(CONFIG, n_local=17), dtype="float32")
        with pytest.raises(ValueError, match="saved with n_local=16, but the model is loaded with 17"):
            other.restore(saved)
        assert ra.load(folder, dataclasses.replace(CONFIG, threads=1, top_k=5), dtype="float32").restore(saved)

    def test_a_newer_format(self, llm, saved):
        manifest = json.loads((saved / "manifest.json").read_text())
        (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
        with pytest.raises(ValueError, match="format 99"):
            llm.restore(saved)


def test_model_without_chat_template_continues_text(tmp_path):
    folder = save_tiny_chat_model(tmp_path / "plain", chat_template=None)
    llm = ra.load(folder, CONFIG, dtype="float32")
    session = llm.session()
    done = session.ask(TEXT, max_new_tokens=4)
    session.ask(" More.", max_new_tokens=4)
    assert session.token_ids[: len(llm.encode(TEXT)) + 4] == llm.encode(TEXT) + done.token_ids
    with pytest.raises(ValueError, match="no chat template"):
        llm.generate([{"role": "user", "content": "hello"}])


def test_session_saved_after_an_interrupted_read_restores_its_own_cache(llm, tmp_path, monkeypatch):
    """The cache then holds tokens that are not part of the conversation."""
    session = llm.session()
    session.ask("One?", max_new_tokens=3)
    calls = []

    def stop_late(progress):
        calls.append(progress)
        if progress.done >= 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(TEXT, on_progress=stop_late)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    question = "How many ships does the keeper count, and why? " * 3
    ours, theirs = (s.ask(question, max_new_tokens=6) for s in (session, restored))
    assert theirs.token_ids == ours.token_ids
    assert theirs.stats.reused_tokens == ours.stats.reused_tokens
    assert ours.token_ids == llm.generate(session.token_ids[:-6], max_new_tokens=6).token_ids


def test_two_sessions_in_two_threads_give_what_they_give_alone(llm):
    texts = [TEXT + "How many?", "Another text altogether. " * 12]
    alone = [llm.session().ask(text, max_new_tokens=8).token_ids for text in texts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda text: llm.session().ask(text, max_new_tokens=8).token_ids, texts))
    assert together == alone
