"""What goes wrong in a conversation: each fault has its message, and afterwards the session answers as if unharmed."""

import errno
import gc
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from laws import rarely, some_of, times
from tiny_models import save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.index import BuildCancelled, build_index

# One token per byte: chunks of 50 make 340 far keys, of which an index covers 256.
TEXT = "The lighthouse keeper counts ships. " * 9
OTHER_TEXT = "Nobody has seen the blue whale since. " * 9
QUESTION = "How many ships does the keeper count?"
N_ASKED = len(TEXT + QUESTION)


def load_tiny(folder, index="graph", **options):
    """Eight of the far keys are read, so that what an index finds shows in the tokens."""
    defaults = {"top_k": 8, "n_sink": 4, "n_local": 16, "exact_below": 0, "prefill_chunk": 50}
    return ra.load(folder, ra.RetrievalConfig(index=index, **(defaults | options)), dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder):
    return load_tiny(folder)


@pytest.fixture(scope="module")
def expected(llm):
    """The answer that nothing has disturbed."""
    return asked(llm.session())


def asked(session, n=30, text=TEXT, **options):
    """The same question about the same text, whatever the session held before."""
    return session.answer(session.llm.encode(text + QUESTION), max_new_tokens=n, **options).token_ids


def broken(monkeypatch, where, error, at=1):
    """Let call number `at` of something in the package raise; the other calls do what they did."""
    where = f"retrieval_attn.{where}"
    intact, calls = pkgutil.resolve_name(where), []

    def call_or_raise(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return intact(*args, **options)

    monkeypatch.setattr(where, call_or_raise)


def failing_builds(monkeypatch, kind, error):
    """Indexes of a kind cannot be built any more."""

    def build_or_fail(wanted, *args, **options):
        if wanted == kind:
            raise error
        return build_index(wanted, *args, **options)

    monkeypatch.setattr("retrieval_attn.far.index_build.build_index", build_or_fail)


def start_child(function, folder):
    """Call a function of this file in a process of its own, with the folder of a model."""
    code = f"import test_faults; test_faults.{function.__name__}({str(folder)!r})"
    # One thread, as in these tests: beside another test two would wait for each other.
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def run_child(function, folder):
    """As `start_child`; returns what it printed, once it has ended well."""
    with start_child(function, folder) as child:
        try:
            printed, _ = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 0
    return printed


class TestRefusedMemory:
    @pytest.mark.parametrize("at", [7, 8])
    def test_midway_through_a_prompt(self, llm, expected, monkeypatch, at):
        """Six arrays are made with the first chunk; the third outgrows the keys of layer 1, and then its values."""
        session = llm.session()
        session.cache.retrieval_layers[1]._capacity = 100
        with monkeypatch.context() as patched:
            broken(patched, "kv.address_space.mmap.mmap", OSError(errno.ENOMEM, "Cannot allocate memory"), at)
            with pytest.raises(MemoryError, match=r"refused .* GiB of address space, .* raise .* kv_dtype='int8'"):
                asked(session)
        assert session.cache.get_seq_length() == 100
        assert asked(session) == expected

    def test_by_a_store_that_takes_no_more(self, llm, expected, monkeypatch):
        session = llm.session()
        with monkeypatch.context() as patched:
            broken(patched, "kv.host_store.HostStore.append", MemoryError("no room"), at=8)
            with pytest.raises(MemoryError, match="^no room$"):
                asked(session)
        assert asked(session) == expected

    @pytest.mark.parametrize("at", range(1, 7))
    def test_in_a_fork(self, llm, expected, monkeypatch, at):
        session = llm.session()
        asked(session, 1)
        with monkeypatch.context() as patched:
            broken(patched, "kv.address_space.mmap.mmap", OSError(errno.ENOMEM, "Cannot allocate memory"), at)
            with pytest.raises(MemoryError, match=r"refused .* GiB of address space"):
                session.fork()
        assert asked(session.fork()) == asked(session) == expected

    def test_by_the_system(self, folder):
        assert "the system refused 0.13 GiB of address space" in run_child(child_short_of_memory, folder)


def child_short_of_memory(folder):
    """A limit of the process, reached in the second of three layers."""
    llm = load_tiny(folder)
    expected = asked(llm.session())
    session = llm.session()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 400 * 2**20, hard))
    try:
        asked(session)
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert asked(session) == expected


class TestFailedIndexes:
    @pytest.mark.parametrize("index", ["graph", "scan"])
    def test_a_build_that_fails(self, folder, monkeypatch, caplog, index):
        llm = load_tiny(folder, index)
        session = llm.session()
        with monkeypatch.context() as patched:
            failing_builds(patched, index, RuntimeError("a bug"))
            assert asked(session) == asked(load_tiny(folder, "exact").session())
        assert f"the {index} index cannot be built (a bug); all keys are searched exactly until" in caplog.text
        assert asked(session) == asked(llm.session())
        assert {memory.far_index.if_built.kind for memory in session.cache.memories} == {index}

    def test_an_append_in_the_background_that_fails(self, folder, monkeypatch, caplog):
        """The estimator sums up nothing: a summary made anew differs from one that grew."""
        llm = load_tiny(folder, "scan", estimator="topk")
        session = llm.session()
        with monkeypatch.context() as patched:
            broken(patched, "index.ScanIndex.append", RuntimeError("a bug"), at=2)
            answer = asked(session, 90)
        assert answer == asked(load_tiny(folder, "exact", estimator="topk").session(), 90)
        assert "the scan index cannot take new keys (a bug); all keys are searched exactly until" in caplog.text
        assert asked(session, 90) == asked(llm.session(), 90)


class TestInterruptions:
    @pytest.mark.parametrize(
        ("where", "at"),
        [
            ("session.Session._begin", 1),
            ("hf.layer.prefill", 11),
            ("kv.host_store.HostStore.append", 11),
            ("kv.window.Window.append", 12),
            ("far.query_sample.QuerySample.add", 13),
            ("hf.cache.RetrievalCache.start_builds", 1),
            ("attention.layer_memory.LayerMemory.build_inputs", 2),
            ("threads.jobs.Job.wait", 1),
            ("far.far_index.FarIndex._take_build", 2),
            ("far.far_index.FarIndex.adopt", 3),
            ("attention.decode.attend_near", 20),
            ("far.estimators.attend_far", 20),
            ("far.far_index.FarIndex._follow", 40),
            ("generate.summarise", 1),
        ],
    )
    def test_by_the_user(self, llm, expected, monkeypatch, where, at):
        """During prefill, the wait for a build, decoding, and after it."""
        session = llm.session()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            broken(patched, where, KeyboardInterrupt(), at)
            asked(session)
        assert asked(session) == expected

    @pytest.mark.parametrize(
        ("where", "at"),
        some_of(["hf.cache.RetrievalCache.settle", "attention.layer_memory.LayerMemory.crop"], [1, 2, 3, 4]),
    )
    def test_while_it_is_mended(self, llm, expected, monkeypatch, where, at):
        """A second Ctrl-C, when the first has left the layers uneven."""
        session = llm.session()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            broken(patched, "kv.window.Window.append", KeyboardInterrupt(), at=11)
            broken(patched, where, KeyboardInterrupt(), at)
            asked(session)
        assert asked(session) == expected

    @pytest.mark.long
    def test_by_signals_at_any_moment(self, folder):
        run_child(child_interrupted, folder)

    @pytest.mark.parametrize(("phase", "at"), [("prefill", 1), ("prefill", 4), ("build", 1), ("build", 3)])
    def test_by_an_error_of_the_caller(self, llm, expected, phase, at):
        session, seen = llm.session(), []

        def on_progress(progress):
            seen.append(progress.phase)
            if seen.count(phase) == at:
                raise ZeroDivisionError("of the caller")

        with pytest.raises(ZeroDivisionError, match="^of the caller$"):
            asked(session, on_progress=on_progress)
        assert asked(session) == expected


def child_interrupted(folder):
    """Ctrl-C at moments of reading, asking and forking, and as builds end."""
    llm = load_tiny(folder)
    expected = asked(llm.session())
    started = time.perf_counter()
    asked(llm.session().fork())
    whole = time.perf_counter() - started
    n = times(12)
    for i in range(n):
        timer = threading.Timer(whole * i / n, os.kill, (os.getpid(), signal.SIGINT))
        session = interrupted(llm, timer.start)
        assert asked(session) == expected, i
    for at in (1, 2, 3) * (n // 4):
        with pytest.MonkeyPatch.context() as patched:
            session = interrupted(llm, lambda patched=patched, at=at: interrupting_builds(patched, at))
        assert asked(session) == expected, at


def interrupted(llm, begin):
    """A session that asks and forks until the signal comes, which `begin` prepares."""
    session = llm.session()
    try:
        begin()
        asked(session)
        asked(session.fork())
        # Had it been faster than the signal.
        time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    return session


def interrupting_builds(monkeypatch, at):
    """Build number `at` sends the signal as its last act."""
    calls = []

    def build_and_interrupt(*args, **options):
        calls.append(1)
        index = build_index(*args, **options)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return index

    monkeypatch.setattr("retrieval_attn.far.index_build.build_index", build_and_interrupt)


class TestThreads:
    @pytest.mark.parametrize("index", ["graph", *rarely("scan")])
    def test_two_documents_in_two_threads(self, folder, index):
        llm = load_tiny(folder, index)
        texts = [TEXT, OTHER_TEXT]
        alone = [asked(llm.session(), 90, text) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda text: asked(llm.session(), 90, text), texts * 2))
        assert together == alone * 2

    def test_none_is_left_when_sessions_are_dropped(self, llm):
        before = our_threads()
        session = llm.session()
        asked(session, 150)
        asked(session.fork(), 2)
        del session
        gc.collect()
        assert ended(our_threads() - before)

    def test_none_builds_for_a_session_that_was_dropped(self, llm, monkeypatch):
        before, end = our_threads(), endless_builds(monkeypatch)
        session = llm.session()
        session.read(TEXT)
        del session
        gc.collect()
        gone = ended(our_threads() - before, within_s=2)
        end.set()
        assert ended(our_threads() - before)
        assert gone

    @pytest.mark.long
    def test_builds_do_not_keep_the_interpreter(self, folder):
        with start_child(child_that_builds, folder) as child:
            try:
                assert child.stdout.readline() == "leaving\n"
                assert child.wait(timeout=10) == 0
            finally:
                child.kill()


def child_that_builds(folder):
    """Ends while an index is built."""
    endless_builds(pytest.MonkeyPatch())
    session = load_tiny(folder).session()
    session.read(TEXT)
    print("leaving", flush=True)


def endless_builds(monkeypatch):
    """Builds go on until they are cancelled, or the event returned is set."""
    end = threading.Event()

    def build_on(*args, cancel, **options):
        while not cancel() and not end.wait(0.01):
            pass
        raise BuildCancelled("cancelled")

    monkeypatch.setattr("retrieval_attn.far.index_build.build_index", build_on)
    return end


def our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("retrieval-")}


def ended(threads, within_s=30):
    """Whether the threads end by themselves."""
    until = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


class Disk:
    """A real one of 4 MiB, which can be filled."""

    def __init__(self, folder):
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self, but=0):
        """Leave `but` bytes free."""
        room = os.statvfs(self.folder)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - but)

    def empty(self):
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root may mount a small disk: {mounted.stderr.decode().strip()}")
    # Page by page, so that a small disk is filled midway.
    monkeypatch.setattr("retrieval_attn.kv.address_space._DISK_STEP", 4096)
    yield Disk(tmp_path)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


class TestFullDisk:
    FULL = r"the disk of kv_dir is full \(\d+ bytes more were needed\); free some room, or give another folder"

    def test_midway_through_a_prompt(self, folder, disk, expected):
        session = load_tiny(folder, kv_dir=str(disk.folder)).session()
        disk.fill(but=160 << 10)
        with pytest.raises(OSError, match=self.FULL):
            asked(session)
        assert 100 <= session.cache.get_seq_length() < N_ASKED
        disk.empty()
        assert asked(session) == expected

    def test_midway_through_an_answer(self, folder, disk, llm):
        session = load_tiny(folder, kv_dir=str(disk.folder)).session()
        asked(session, 1)
        disk.fill()
        with pytest.raises(OSError, match=self.FULL):
            asked(session, 150)
        whole = asked(llm.session(), 150)
        assert session.last.token_ids == whole[: len(session.last.token_ids)]
        disk.empty()
        assert asked(session, 150) == whole

    @pytest.fixture
    def session(self, folder, disk, monkeypatch):
        """One that shares its text with forks, short as it is."""
        monkeypatch.setattr("retrieval_attn.kv.shared_rows.FEW", 0)
        session = load_tiny(folder, kv_dir=str(disk.folder)).session()
        asked(session, 1)
        return session

    def test_in_a_fork(self, session, disk, expected):
        session.fork()
        assert asked(session) == expected
        disk.fill()
        with pytest.raises(OSError, match=self.FULL):
            session.fork()
        assert asked(session) == expected
        disk.empty()
        assert asked(session.fork()) == expected

    def test_a_fork_takes_room_for_its_own_tokens_only(self, session, disk, expected):
        """Of twelve arrays, the text fills five pages and begins a sixth, and the answer ends in the seventh."""
        disk.fill(but=12 * 3 * 4096)
        fork = session.fork()
        assert asked(fork) == expected
        assert asked(session, 1) == expected[:1]


class TestLimits:
    def test_max_tokens_midway_through_an_answer(self, folder, expected):
        session = load_tiny(folder, max_tokens=N_ASKED + 20).session()
        assert asked(session) == expected[:20]
        assert session.last.stats.stop_reason == "context"
        with pytest.raises(ValueError, match=f"the maximum is {N_ASKED + 20}"):
            session.ask("And now?")
        assert asked(session, 10) == expected[:10]

    def test_max_host_bytes_midway_through_an_answer(self, folder, expected):
        """A token takes 768 bytes: 16 float32 of a key and of a value, for two heads in three layers."""
        session = load_tiny(folder, max_host_bytes=(N_ASKED + 20) * 768 + 767).session()
        assert asked(session) == expected[:20]
        assert session.last.stats.stop_reason == "context"
        with pytest.raises(ValueError, match=f"the maximum is {N_ASKED + 20}"):
            session.ask("And now?")
        assert asked(session, 10) == expected[:10]
