"""A stream that is open when its session is asked something else: it ends, what it said is kept, nothing is mixed.

Every answer afterwards is compared with that of a new session that is given the same ids.
"""

import threading

import pytest
from tiny_models import save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.threads.one_at_a_time import OneAtATime

CONFIG = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 4
BUSY = "the session is at work, in another thread or around this call"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return ra.load(save_tiny_chat_model(tmp_path_factory.mktemp("models") / "llama"), CONFIG, dtype="float32")


def opened(session, question=TEXT + "How many?", n_pieces=3, **sampling):
    """A stream of which some pieces were drawn."""
    stream = session.stream(question, max_new_tokens=12, **sampling)
    pieces = [next(stream) for _ in range(n_pieces)]
    return stream, "".join(pieces)


def assert_sound(session, question="And who?"):
    """What the session says next is what a new one says that is given the same ids."""
    done = session.ask(question, max_new_tokens=6)
    asked = session.token_ids[: -len(done.token_ids)]
    assert done.token_ids == session.llm.session().answer(asked, max_new_tokens=6).token_ids
    assert [said["role"] for said in session.messages] == ["user", "assistant"] * (len(session.messages) // 2)
    assert session.messages[-1]["content"] == done.text


def test_saved_while_it_is_drawn(llm, tmp_path):
    session = llm.session()
    for _ in session.stream(TEXT, max_new_tokens=12):
        session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    assert restored.token_ids == session.token_ids
    assert restored.messages == session.messages
    assert_sound(restored)
    assert_sound(session)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
def test_regenerated_while_it_is_open(llm, sampling):
    session = llm.session()
    stream, said = opened(session, **sampling)
    again = "".join(session.regenerate(max_new_tokens=6, **sampling))
    assert said
    assert again == session.last.text
    assert len(session.messages) == 2
    assert list(stream) == []
    assert_sound(session)


@pytest.mark.parametrize("n_pieces", [0, 3])
def test_cleared_while_it_is_open(llm, n_pieces):
    session = llm.session()
    stream, _ = opened(session, n_pieces=n_pieces)
    session.clear()
    stream.close()
    assert (session.token_ids, session.messages, session.last) == ([], [], None)
    assert session.cache.get_seq_length() == 0
    assert_sound(session)


def test_a_newer_turn_is_not_overwritten(llm):
    session = llm.session()
    stream, said = opened(session)
    done = session.ask("And now?", max_new_tokens=4)
    before = session.token_ids, session.messages, session.last
    assert session.messages[1]["content"].startswith(said)
    assert list(stream) == []
    stream.close()
    assert (session.token_ids, session.messages, session.last) == before
    assert session.last is done
    assert_sound(session)


@pytest.mark.parametrize("n_pieces", [0, 3])
def test_two_streams_drawn_in_turn(llm, n_pieces):
    session = llm.session()
    first, _ = opened(session, n_pieces=n_pieces)
    second = session.stream("And now?", max_new_tokens=6)
    drawn = [next(second), *first, *second]
    assert "".join(drawn) == session.last.text
    assert len(session.messages) == (4 if n_pieces else 2)
    assert_sound(session)


def test_forked_while_it_is_open(llm):
    session = llm.session()
    stream, said = opened(session)
    fork = session.fork()
    assert list(stream) == []
    assert fork.token_ids == session.token_ids
    assert fork.messages[-1]["content"].startswith(said)
    fork_stream, _ = opened(fork, "And now?")
    assert_sound(session)
    next(fork_stream)
    assert_sound(fork)


def test_dropped_at_once(llm):
    """Nothing else need happen for what was said to be kept."""
    session = llm.session()
    stream, said = opened(session)
    del stream
    assert session.messages[-1]["content"].startswith(said)
    assert_sound(session)


def test_token_ids_follow_the_stream(llm):
    session = llm.session()
    stream = session.stream(TEXT, max_new_tokens=5)
    lengths = [len(session.token_ids) for _ in stream]
    assert lengths == sorted(set(lengths)) or len(lengths) < 5
    assert session.token_ids[-len(session.last.token_ids) :] == session.last.token_ids
    # The last token was drawn, and never run.
    assert session.cache.get_seq_length() == len(session.token_ids) - 1
    assert list(session.state().cached_ids) == session.token_ids[:-1]


def test_a_text_read_after_an_answer_outlives_another_try(llm):
    session = llm.session()
    session.ask(TEXT, max_new_tokens=5)
    session.read("The boats are red. ")
    list(session.regenerate(max_new_tokens=4))
    assert [said["role"] for said in session.messages] == ["user", "assistant", "user"]
    assert session.messages[-1]["content"] == "The boats are red. "
    assert "The boats are red" in llm.decode(session.token_ids)
    list(session.regenerate(max_new_tokens=4))
    assert len(session.messages) == 3
    assert_sound(session, "Which boats?")
    assert session.messages[2]["content"] == "The boats are red. \n\nWhich boats?"


def calls_on(session, tmp_path):
    return {
        "ask": lambda: session.ask("Again?", max_new_tokens=2),
        "stream": lambda: session.stream("Again?"),
        "answer": lambda: session.answer(session.llm.encode(TEXT), max_new_tokens=2),
        "read": lambda: session.read(TEXT),
        "save": lambda: session.save(tmp_path / "saved"),
        "fork": session.fork,
        "clear": session.clear,
        "regenerate": session.regenerate,
    }


@pytest.mark.parametrize("during", ["read", "ask"])
def test_a_call_beside_another_is_refused_and_does_no_harm(llm, tmp_path, during):
    """From a callback, and from another thread."""
    session = llm.session()
    session.ask("Hello", max_new_tokens=3)
    refused, calls = [], calls_on(session, tmp_path)

    def beside(progress):
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=BUSY):
                call()
            refused.append(name)

    def in_another_thread(progress):
        thread = threading.Thread(target=beside, args=(progress,))
        thread.start()
        thread.join()

    for callback in (beside, in_another_thread):
        refused.clear()
        if during == "read":
            session.read(TEXT, on_progress=callback)
        session.ask(TEXT, max_new_tokens=3, on_progress=callback)
        assert set(refused) == set(calls)
        assert_sound(session)


def test_threads_that_draw_at_will_leave_it_whole(llm):
    session, errors = llm.session(), []

    def draw(question):
        for _ in range(5):
            try:
                for _ in session.stream(question, max_new_tokens=4):
                    pass
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=draw, args=(question,)) for question in ("Who?", "Where?", TEXT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(BUSY in error for error in errors)
    assert_sound(session)


def test_a_turn_that_an_interruption_took_is_free_again():
    turns = OneAtATime("taken")
    with turns.taken(), pytest.raises(RuntimeError, match="taken"), turns.taken():
        pass
    with pytest.raises(KeyboardInterrupt), turns.taken():
        raise KeyboardInterrupt
    with turns.taken():
        pass
