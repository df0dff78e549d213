"""Branching and follow-up turns: forks go on apart, later turns equal a fresh run, and int8 or disk change little."""

import pkgutil
import threading
import time

import pytest
import torch
from laws import rarely, some_of
from tiny_models import prompt_ids, save_tiny_chat_model, tiny_model

import retrieval_attn as ra
import retrieval_attn.far.far_index
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.hf.versions import cache_argument

EVERYTHING = 1 << 20
TEXT = "The lighthouse keeper counts ships. " * 8


def small(index="exact", **options):
    defaults = {"top_k": EVERYTHING, "n_sink": 4, "n_local": 16, "exact_below": 0, "prefill_chunk": 50}
    return ra.RetrievalConfig(index=index, **(defaults | options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_tiny_chat_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


# Sliding-window layers beside ours do not know which index ours have.
FORKED = [("llama", "graph"), ("gemma3", "exact")]
FORKED += rarely(*(("llama", index) for index in ("exact", "ivf", "scan", "page")), ("gemma3", "graph"))


@pytest.mark.parametrize(("kind", "index"), FORKED)
def test_forks_answer_as_sessions_of_their_own(folders, kind, index):
    """Few keys are retrieved, so that a fork's index must find what the origin's would."""
    llm = ra.load(folders(kind), small(index, top_k=8), dtype="float32")
    origin = llm.session()
    origin.read(TEXT)
    questions = ["How many?", "What is counted, and where does it go?"]
    alone = []
    for question in questions:
        session = llm.session()
        session.read(TEXT)
        alone.append(session.ask(question, max_new_tokens=90).token_ids)
    forks = [origin.fork() for _ in questions]
    for fork, question, expected in zip(forks, questions, alone, strict=True):
        done = fork.ask(question, max_new_tokens=90)
        assert done.token_ids == expected
        assert done.stats.reused_tokens > 280
    assert [message["role"] for message in origin.messages] == ["user"]
    assert origin.ask(questions[0], max_new_tokens=90).token_ids == alone[0]


def test_a_fork_of_a_fork_and_a_dropped_origin(folders):
    llm = ra.load(folders("llama"), small("scan", top_k=8), dtype="float32")
    session = llm.session()
    session.read(TEXT)
    expected = [session.fork().ask("How many?", max_new_tokens=40).token_ids]
    fork = session.fork()
    fork.ask("Who counts?", max_new_tokens=30)
    twice = fork.fork()
    del session, fork
    one = twice.fork().ask("Sure?", max_new_tokens=30).token_ids
    assert twice.ask("Sure?", max_new_tokens=30).token_ids == one
    twice.answer(twice.token_ids[:200], max_new_tokens=2)
    again = llm.session()
    again.read(TEXT)
    assert again.ask("How many?", max_new_tokens=40).token_ids == expected[0]


def test_forks_in_threads_give_the_same_tokens_as_alone(folders):
    llm = ra.load(folders("llama"), small("graph", top_k=8), dtype="float32")
    session = llm.session()
    session.read(TEXT)
    questions = ["How many?", "Who counts?"] * 2
    alone = [session.fork().ask(question, max_new_tokens=30).token_ids for question in questions]
    forks, answers = [session.fork() for _ in questions], [None] * len(questions)

    def ask(i):
        answers[i] = forks[i].ask(questions[i], max_new_tokens=30).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone


def test_a_fork_takes_next_to_no_memory():
    ra.register()
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small("scan", n_local=64, top_k=8))
    with torch.no_grad(), cache.exact():
        for start in range(0, 8000, 2000):
            model(prompt_ids(8000)[:, start : start + 2000], **cache_argument(cache))
    fork = cache.fork()
    for mine, theirs in zip(fork.memories, cache.memories, strict=True):
        assert mine.length == theirs.length == 8000
        shared = {(c.file.descriptor, c.at) for c in mine.store._keys.rows._pages.covers}
        assert shared
        assert shared <= {(c.file.descriptor, c.at) for c in theirs.store._keys.rows._pages.covers}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("index", ["exact", "graph"])
def test_follow_ups_that_retrieve_everything_equal_exact_ones(folders, kind, index):
    """Law 3 for blocks: what was near before a block stays near to all of it."""
    answers = []
    for followup in ("exact", "retrieve"):
        llm = ra.load(folders(kind), small(index, followup=followup), dtype="float32")
        session = llm.session()
        session.read(TEXT)
        answers.append([session.ask(q, max_new_tokens=12).token_ids for q in (TEXT[:100] + "How many?", "Sure?")])
    assert answers[0] == answers[1]


def block_error(monkeypatch, config, start=200, n=300):
    """Relative distance of the logits of a block that retrieves from those of stock attention."""
    ids, model = prompt_ids(n), tiny_model("llama")
    cache = ra.RetrievalCache(model.config, config)
    with torch.no_grad():
        stock = tiny_model("llama", "sdpa")(ids).logits[0, start:]
        with cache.exact():
            model(ids[:, :start], **cache_argument(cache))
        with cache.retrieving():
            ours = model(ids[:, start:], **cache_argument(cache)).logits[0]
    return float((ours - stock).norm() / stock.norm())


@pytest.mark.parametrize("start", [1, 3, 19, 20, 21, 200])
def test_a_block_sees_every_key_once(monkeypatch, start):
    ra.register()
    assert block_error(monkeypatch, small(estimator="topk"), start) < 1e-4


def test_a_block_that_misses_keys_is_noticed(monkeypatch):
    ra.register()
    assert block_error(monkeypatch, small(estimator="topk", top_k=4)) > 1e-2


@pytest.mark.parametrize("followup", ["retrieve", *rarely("exact")])
def test_fifty_turns_equal_a_fresh_run(folders, followup):
    """Law 6, turn by turn, against one prefill of everything said so far."""
    llm = ra.load(folders("llama"), small("scan", followup=followup, prefill_chunk=400), dtype="float32")
    session = llm.session()
    session.read(TEXT)
    for turn in range(50):
        done = session.ask(f"Turn {turn}: what then?", max_new_tokens=4)
        if turn % 7 == 0 or turn == 49:
            asked = session.token_ids[: -len(done.token_ids)]
            assert done.token_ids == llm.generate(asked, max_new_tokens=4).token_ids, turn
    assert len(session.token_ids) > 1500


@pytest.mark.parametrize("index", ["exact", "ivf", "scan", *rarely("graph", "page")])
def test_int8_stays_near_the_model(index):
    """Of 500 far keys all are read, as integers. These models' attention is so sharp that rounding shows."""
    ra.register()
    ids, model = prompt_ids(520), tiny_model("llama")
    logits = []
    for kv_dtype in ("auto", "int8"):
        cache = ra.RetrievalCache(model.config, small(index, kv_dtype=kv_dtype))
        with torch.no_grad():
            model(ids[:, :500], **cache_argument(cache))
            logits.append(
                torch.cat([model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(500, 520)])
            )
        stored = cache.memories[0].store
        assert stored.keys().dtype == (torch.int8 if kv_dtype == "int8" else torch.float32)
    assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.2


def int8_memory():
    """Of one layer, 301 tokens long, with an index."""
    ra.register()
    ids, model = prompt_ids(300), tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small("scan", kv_dtype="int8"))
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        model(ids[:, :1], **cache_argument(cache))
    return cache.memories[1]


def test_int8_scales_that_change_build_the_index_anew():
    memory = int8_memory()
    index = memory.index()
    keys, values = memory.store.read(0, 1)
    memory.append(torch.zeros((1, 4, 1, 16)), keys[None] * 50, values[None])
    assert memory.far_index.if_built is None
    assert memory.index() is not index


@pytest.mark.parametrize("kv_dtype", ["auto", *rarely("int8")])
def test_keys_on_disk_give_the_same_tokens(folders, tmp_path, kv_dtype):
    answers = []
    for kv_dir in (None, str(tmp_path)):
        llm = ra.load(folders("llama"), small("graph", top_k=8, kv_dir=kv_dir, kv_dtype=kv_dtype), dtype="float32")
        session = llm.session()
        session.read(TEXT)
        fork = session.fork()
        answers.append([s.ask("How many?", max_new_tokens=30).token_ids for s in (session, fork)])
    assert answers[0] == answers[1]


def test_a_kv_dir_that_is_no_folder_is_named(folders, tmp_path):
    llm = ra.load(folders("llama"), small(kv_dir=str(tmp_path / "missing")), dtype="float32")
    with pytest.raises(OSError, match=r"kv_dir '.*missing' cannot hold keys and values: No such file"):
        llm.generate("Hello", max_new_tokens=2)


@pytest.mark.parametrize(
    "where", ["kv.window.Window.crop", "kv.device_prefix.DevicePrefix.crop", "far.query_sample.QuerySample.crop"]
)
@pytest.mark.parametrize("at", [2, *rarely(1, 3)])
def test_a_crop_interrupted_then_a_longer_conversation(folders, monkeypatch, where, at):
    """Layers that had gone back and those that had not said the same length, and the next turn lost tokens."""
    llm = ra.load(folders("llama"), small(), dtype="float32")
    session = llm.session()
    session.ask(TEXT, max_new_tokens=40)
    calls, place = [], f"retrieval_attn.{where}"
    plain = pkgutil.resolve_name(place)

    def interrupted(*args):
        plain(*args)
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(place, interrupted)
        for _ in session.regenerate(max_new_tokens=40):
            pass
    done = session.ask("And now?", max_new_tokens=12)
    asked = session.token_ids[: -len(done.token_ids)]
    assert done.token_ids == llm.generate(asked, max_new_tokens=12).token_ids


def test_int8_scales_that_change_in_an_append_that_fails(monkeypatch):
    """The rows were written anew before the error; the index over the old ones must go, too."""
    memory = int8_memory()
    index = memory.index()
    keys, values = memory.store.read(0, 1)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("retrieval_attn.kv.host_store.HostStore._write", _raising(OSError("full")))
        memory.append(torch.zeros((1, 4, 1, 16)), keys[None] * 50, values[None])
    memory.crop(301)
    assert memory.index() is not index
    covered = memory.far_keys()[:, : memory.index().n_keys]
    assert (memory.index()._state.keys.array == covered.numpy()).all()


def _raising(error):
    def raising(*args, **kwargs):
        raise error

    return raising


def test_a_fork_and_a_restored_session_go_on_where_the_last_step_was(folders, tmp_path):
    """With a mass budget, how many keys a step asks for first depends on the step before."""
    config = small("scan", top_k=8, mass=0.7, followup="retrieve", min_k=2)
    llm = ra.load(folders("llama"), config, dtype="float32")
    session = llm.session()
    session.read(TEXT)
    session.ask("How many?", max_new_tokens=30)
    session.save(tmp_path / "saved")
    sides = [session.fork(), llm.restore(tmp_path / "saved"), session]
    for name in ("reach", "rest", "steps"):
        wanted = [getattr(memory, name) for memory in session.cache.memories]
        assert [getattr(memory, name) for memory in sides[0].cache.memories] == wanted
    answers = [side.ask("And now, what of it?", max_new_tokens=40).token_ids for side in sides]
    assert answers[0] == answers[1] == answers[2]


def test_answers_do_not_depend_on_when_the_background_is_done(folders, monkeypatch):
    llm = ra.load(folders("llama"), small("scan", top_k=8), dtype="float32")
    expected = llm.generate(TEXT, max_new_tokens=200).token_ids
    append = retrieval_attn.far.far_index._append_next

    def late(*args):
        time.sleep(0.3)
        append(*args)

    monkeypatch.setattr("retrieval_attn.far.far_index._append_next", late)
    assert llm.generate(TEXT, max_new_tokens=200).token_ids == expected


def test_an_append_that_nobody_waits_for_does_no_harm(folders, monkeypatch, caplog):
    """As if Ctrl-C had struck after it was handed over, and before its job was noted."""
    ra.register()
    model, ids = tiny_model("llama"), prompt_ids(400)
    cache = ra.RetrievalCache(model.config, small("scan"))
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        for i in range(200):
            model(ids[:, i : i + 1], **cache_argument(cache))
            for memory in cache.memories:
                memory.far_index._appending = None
    assert "searched exactly" not in caplog.text
    assert {memory.index().kind for memory in cache.memories} == {"scan"}


class TestLimits:
    def test_a_batch_shares_what_one_cache_may_hold(self, folders):
        per_token = 3 * 2 * 2 * 16 * 4
        llm = ra.load(folders("llama"), small(max_host_bytes=100 * per_token), dtype="float32")
        with pytest.raises(ValueError, match="prompt 0 has 60 tokens, the maximum is 50"):
            llm.generate(["x" * 60, "y" * 60])
        done = llm.generate(["x" * 45, "y" * 40], max_new_tokens=20)
        assert [(len(c.token_ids), c.stats.stop_reason) for c in done] == [(5, "context"), (10, "context")]

    def test_rows_that_are_added_share_it_too(self):
        ra.register()
        model, per_token = tiny_model("llama"), 3 * 2 * 2 * 16 * 4
        cache = ra.RetrievalCache(model.config, small(max_host_bytes=100 * per_token))
        with torch.no_grad():
            model(prompt_ids(40), **cache_argument(cache))
            cache.batch_repeat_interleave(2)
            model(prompt_ids(10, batch=2), **cache_argument(cache))
            with pytest.raises(MemoryError, match="50 tokens fill max_host_bytes"):
                model(prompt_ids(1, batch=2), **cache_argument(cache))

    def test_max_tokens_limits_prompt_and_answer(self, folders):
        llm = ra.load(folders("llama"), small(max_tokens=100), dtype="float32")
        with pytest.raises(ValueError, match="the maximum is 100"):
            llm.generate(TEXT)
        done = llm.generate("x" * 90, max_new_tokens=50)
        assert (done.stats.stop_reason, len(done.token_ids)) == ("context", 10)

    def test_max_host_bytes_limits_them_too(self, folders):
        per_token = 3 * 2 * 2 * 16 * 4
        llm = ra.load(folders("llama"), small(max_host_bytes=100 * per_token), dtype="float32")
        with pytest.raises(ValueError, match="the maximum is 100"):
            llm.generate(TEXT)
        assert llm.generate("x" * 90, max_new_tokens=50).stats.stop_reason == "context"

    def test_a_cache_keeps_to_its_limits_midway_and_stays_usable(self):
        ra.register()
        model, ids = tiny_model("llama"), prompt_ids(300)
        per_token = 3 * 2 * 2 * 16 * 4
        for config in (small(max_tokens=250), small(max_host_bytes=250 * per_token)):
            cache = ra.RetrievalCache(model.config, config)
            with torch.no_grad():
                model(ids[:, :200], **cache_argument(cache))
                with pytest.raises(MemoryError, match=r"max_tokens=250|250 tokens fill max_host_bytes"):
                    model(ids[:, 200:], **cache_argument(cache))
                cache.settle()
                assert cache.get_seq_length() == 200
                model(ids[:, 200:250], **cache_argument(cache))

    def test_every_layer_is_a_retrieval_layer_after_a_fork(self):
        cache = ra.RetrievalCache(tiny_model("llama").config, small())
        assert all(isinstance(layer, RetrievalLayer) for layer in cache.fork().layers)


@pytest.mark.parametrize(
    ("options", "kind"),
    some_of([{"n_sink": 9, "n_local": 40}, {"index": "graph"}, {"n_local": 5000}], ["llama", "gemma3"]),
)
def test_a_fork_with_other_options_is_a_cache_made_with_them(kind, options):
    """What was read once goes on as if it had been read that way, and what it was forked from goes on as before."""
    ra.register()
    ids, model = prompt_ids(400), tiny_model(kind)
    before, own = small(top_k=8), small(top_k=6, **options)

    def steps(cache):
        with torch.no_grad():
            return torch.cat([model(ids[:, i : i + 1], **cache_argument(cache)).logits[0] for i in range(20)])

    def read(config):
        cache = ra.RetrievalCache(model.config, config)
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        return cache

    origin, expected = read(before), steps(read(before))
    fork = origin.fork(own)
    torch.testing.assert_close(steps(fork), steps(read(own)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps(origin), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steps(read(own)), expected, atol=1e-3)


def test_a_fork_keeps_how_tokens_are_stored():
    cache = ra.RetrievalCache(tiny_model("llama").config, small())
    with pytest.raises(ValueError, match="a fork must keep kv_dtype='auto', got 'int8'"):
        cache.fork(small(kv_dtype="int8"))
    assert cache.fork(small(top_k=3)).config.top_k == 3
