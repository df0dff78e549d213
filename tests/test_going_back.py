"""Going back on models whose other layers cannot be cropped: what was read is not read again, and the text is the same.

Every answer is compared with that of a session of its own: its tokens, and the logits of every step.
"""

import pytest
import torch
from families import tiny
from family_sweep import Heard, sharpen, stock_model
from laws import rarely
from tiny_models import byte_tokenizer, save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.hf.marks import MOST_MARKS
from retrieval_attn.hf.versions import KEEPS_RECURRENT_STATE
from retrieval_attn.plan import terms
from retrieval_attn.plan.terms import ModelShape

CONFIG = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=100)
TEXT = "The lighthouse keeper counts ships. " * 8
TOLERANCE = 1e-4

KINDS = ["gemma3_text", "qwen3_next", "falcon_h1"]
KINDS += rarely("qwen3_5", "qwen3_5_text", "qwen3_5_moe_text", "bamba", "jamba", "granitemoehybrid", "nemotron_h")
KINDS += rarely("lfm2_moe", "olmo_hybrid", "gemma4_text", "zamba2", "zaya")


@pytest.fixture(scope="module", params=KINDS)
def llm(request, tmp_path_factory):
    """A model of the kind, its attention peaked, with a window of 64 or a recurrent state beside full attention."""
    if not KEEPS_RECURRENT_STATE and request.param != "gemma3_text":
        pytest.skip("this transformers refuses recurrent layers")
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    stock = stock_model(request.param)
    sharpen(stock)
    stock.save_pretrained(folder)
    tiny(request.param).save_pretrained(folder)
    return ra.load(folder, CONFIG, dtype="float32", device="cpu")


def heard(llm, answer, n):
    """What an answer of `n` tokens is, and the logits (n, V) that its tokens were drawn from."""
    with Heard(llm.model) as rows:
        done = answer()
        return done, rows.last(n)[:, 0]


def assert_as_alone(llm, session, ask, n=6):
    """The session's answer is that of a new session that is given the same ids."""
    done, logits = heard(llm, ask, n)
    asked = session.token_ids[: -len(done.token_ids)]
    alone, expected = heard(llm, lambda: llm.session().answer(asked, max_new_tokens=n), n)
    assert done.token_ids == alone.token_ids
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return done


def again(session, n=6):
    for _ in session.regenerate(max_new_tokens=n):
        pass
    return session.last


def test_an_answer_given_anew_runs_one_token_of_its_prompt(llm):
    session = llm.session()
    first = session.ask(TEXT + "How many?", max_new_tokens=6)
    n_prompt = first.stats.prompt_tokens
    for _ in range(2):
        done = assert_as_alone(llm, session, lambda: again(session))
        assert done.token_ids == first.token_ids
        assert done.stats.reused_tokens == n_prompt - 1


def test_one_document_is_read_once_and_asked_about_many_times(llm):
    session = llm.session()
    session.read(TEXT)
    n_read, document = session.cache.get_seq_length(), session.token_ids
    for question in ("How many?", "Who counts, and what?", "How many?"):
        ids = document + llm.encode_text(question)
        done = assert_as_alone(llm, session, lambda ids=ids: session.answer(ids, max_new_tokens=6))
        assert n_read <= done.stats.reused_tokens < len(ids)


def test_a_fork_goes_back_too_and_leaves_its_origin_alone(llm):
    origin = llm.session()
    first = origin.ask(TEXT + "How many?", max_new_tokens=6)
    held = origin.cache.get_seq_length()
    fork = origin.fork()
    done = assert_as_alone(llm, fork, lambda: again(fork))
    assert done.stats.reused_tokens == first.stats.prompt_tokens - 1
    assert origin.cache.get_seq_length() == held
    assert_as_alone(llm, origin, lambda: origin.ask("And now?", max_new_tokens=6))


def test_later_turns_and_edited_ones(llm):
    session = llm.session()
    session.ask(TEXT + "How many?", max_new_tokens=6)
    turn = session.token_ids
    assert_as_alone(llm, session, lambda: session.ask("And boats?", max_new_tokens=6))
    assert_as_alone(llm, session, lambda: again(session))
    edited = turn + llm.encode_text("<|user|>Otherwise!<|end|><|assistant|>")
    done = assert_as_alone(llm, session, lambda: session.answer(edited, max_new_tokens=6))
    # The first answer's last token was drawn, and not yet run, when the turn after it began.
    assert done.stats.reused_tokens == len(turn) - 1


def test_a_prompt_that_shares_less_than_any_mark_is_read_anew(llm):
    session = llm.session()
    session.ask(TEXT + "How many?", max_new_tokens=6)
    ids = session.token_ids[:120] + llm.encode_text("Otherwise!")
    done = assert_as_alone(llm, session, lambda: session.answer(ids, max_new_tokens=6))
    assert done.stats.reused_tokens == 0


@pytest.mark.parametrize("at", ["prompt", "answer"])
def test_interrupted_between_two_layers(llm, monkeypatch, at):
    """The first layer has taken the tokens in, the second has not; a recurrent layer does not tell that it has."""
    session = llm.session()
    session.read(TEXT)
    n_read = session.cache.get_seq_length()
    layer, calls = llm.model.get_decoder().layers[1], []
    forward = type(layer).forward

    def interrupted(self, *args, **kwargs):
        calls.extend([1] if self is layer else [])
        if len(calls) == {"prompt": 1, "answer": 4}[at] and self is layer:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(layer), "forward", interrupted)
        session.ask("How many?", max_new_tokens=6)
    done = assert_as_alone(llm, session, lambda: session.ask("And who?", max_new_tokens=6))
    assert done.stats.reused_tokens >= n_read


def test_a_long_reading_that_is_interrupted_goes_on_from_its_last_mark(llm, monkeypatch):
    """The marks that it leaves on its way are gone when it ends."""
    monkeypatch.setattr("retrieval_attn.generate.MARK_EVERY", 2)
    session = llm.session()

    def interrupt(progress):
        if progress.done == 2 * CONFIG.prefill_chunk:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(TEXT, on_progress=interrupt)
    # In the midst of a pass nothing is held but what was marked.
    with pytest.raises(KeyboardInterrupt), session.cache.moving():
        raise KeyboardInterrupt
    done = assert_as_alone(llm, session, lambda: session.ask(TEXT, max_new_tokens=6))
    assert done.stats.reused_tokens == 2 * CONFIG.prefill_chunk
    assert not any(mark.passing for mark in session.cache._marks)


def test_marks_are_few_and_counted(llm):
    session = llm.session()
    session.read(TEXT)
    one = session.cache.marked_bytes
    for _ in range(4):
        done = session.ask("More?", max_new_tokens=3)
    marks = session.cache._marks
    assert len(marks) == MOST_MARKS
    assert marks[0].n_tokens == len(TEXT) + 1
    assert session.cache.marked_bytes == sum(mark.nbytes for mark in marks) >= MOST_MARKS * one > 0
    stored = sum(memory.store.nbytes for memory in session.cache.memories)
    assert (done.stats.host_kv_bytes, done.stats.marked_bytes) == (stored, session.cache.marked_bytes)
    session.clear()
    assert session.cache.marked_bytes == 0


def test_the_plan_counts_marks(llm):
    """What other layers hold on the device, and four times that for marks."""
    session = llm.session()
    session.read(TEXT)
    shape = ModelShape.of(llm.model.config, torch.float32)
    (mark,) = session.cache._marks
    # A stock sliding layer keeps one token less than its window says, and a tensor of 8 bytes that says how long it is.
    assert mark.nbytes <= terms.marks(shape) / MOST_MARKS + 8 * len(mark.layers)
    # Where heads differ by layer (Gemma 4), the plan takes those with a window to be as large as the others; of Zaya's
    # convolutions the config does not tell.
    differ = getattr(llm.model.config, "is_heterogeneous", False)
    assert differ or mark.nbytes >= 0.8 * terms.marks(shape) / MOST_MARKS
    assert terms.near_window(shape, CONFIG) == shape.n_layers * shape.row * 20 + terms.marks(shape) / MOST_MARKS


def test_a_mark_takes_its_window_or_state_and_no_more(llm):
    session = llm.session()
    session.read(TEXT)
    held = [x for mark in session.cache._marks for layer in mark.layers.values() for x in own(layer)]
    assert held
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)


def test_a_recurrent_state_is_not_saved_and_said_so(llm, tmp_path):
    session = llm.session()
    session.read(TEXT)
    if not any(hasattr(layer, "conv_states") for layer in session.cache.layers):
        pytest.skip("this model has none")
    with pytest.raises(ValueError, match=r"layer 0 \(\w+\) holds a recurrent state, which cannot be saved"):
        session.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_restored_session_has_no_marks_and_reads_anew_once(tmp_path):
    llm = ra.load(save_tiny_chat_model(tmp_path / "gemma3", "gemma3"), CONFIG, dtype="float32", device="cpu")
    session = llm.session()
    first = session.ask(TEXT + "How many?", max_new_tokens=6)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    for reused in (0, first.stats.prompt_tokens - 1):
        done = assert_as_alone(llm, restored, lambda: again(restored), n=len(first.token_ids))
        assert (done.token_ids, done.stats.reused_tokens) == (first.token_ids, reused)


def own(layer):
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [x for x in (*states, getattr(layer, "keys", None)) if x is not None]
