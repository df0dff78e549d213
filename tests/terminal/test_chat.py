"""The chat: commands, files, interruptions and what is shown, with a tiny random model."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import save_tiny_chat_model

from retrieval_attn import RetrievalConfig, load
from retrieval_attn.config import Sampling
from retrieval_attn.generate import GenerationStats
from retrieval_attn.terminal import chat as chat
from retrieval_attn.terminal.bar import PhaseBar
from retrieval_attn.terminal.chat import Chat
from retrieval_attn.terminal.files import read_text, session_folder
from retrieval_attn.terminal.shown import show_answer, size, stats_line

CONFIG = RetrievalConfig(index="exact", n_sink=8, n_local=32, prefill_chunk=128, exact_below=128)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return load(save_tiny_chat_model(tmp_path_factory.mktemp("model")), CONFIG)


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RETRIEVAL_ATTN_DEBUG", raising=False)


class Screen:
    """A chat whose lines are given and whose output is read."""

    def __init__(self, llm, lines=(), interactive=False):
        self._lines = iter(lines)
        self.console = Console(file=io.StringIO(), width=200)
        self.chat = Chat(
            llm.session(),
            self.console,
            sampling=Sampling(max_new_tokens=4),
            interactive=interactive,
            read_line=self._next,
        )

    def _next(self):
        line = next(self._lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    def say(self, line):
        """Take a line; returns whether it went well and what it printed."""
        before = len(self.text)
        return self.chat.take(line), self.text[before:]

    @property
    def text(self):
        return self.console.file.getvalue()


@pytest.fixture
def screen(llm):
    return Screen(llm)


def interrupt_after(pieces, n):
    """A stand-in for `Session.stream` whose answer Ctrl-C ends after n pieces."""

    def stream(text, **options):
        for i, piece in enumerate(pieces(text, **options)):
            if i == n:
                raise KeyboardInterrupt
            yield piece

    return stream


# Turns


def test_a_turn_shows_answer_and_statistics(screen):
    well, text = screen.say("hello")
    assert well
    assert "4 tok · " in text
    assert "TTFT" in text
    assert "(0 cached)" in text
    assert text.rstrip().endswith("cut at max_new_tokens")
    assert len(screen.chat.session.messages) == 2


def test_the_second_turn_reuses_the_first(screen):
    screen.say("hello")
    held = screen.chat.session.cache.get_seq_length()
    _, text = screen.say("again")
    assert f"({held} cached)" in text


def test_empty_lines_are_not_turns(screen):
    assert screen.say("   ") == (True, "")
    assert screen.chat.session.token_ids == []


def test_a_blank_before_a_slash_makes_it_a_turn(screen):
    assert screen.say(" /exit, what is that?")[0]
    assert screen.chat.session.messages[0]["content"] == "/exit, what is that?"


def test_the_run_ends_with_the_lines_and_reports_failed_turns(llm):
    assert Screen(llm, ["hi", "/stats off"]).chat.run() == 0
    failing = Screen(llm, ["/nonsense", "hi"])
    assert failing.chat.run() == 1
    # The error did not stop the rest.
    assert len(failing.chat.session.messages) == 2
    assert Screen(llm, ["/nonsense"], interactive=True).chat.run() == 0


def test_exit_leaves_the_rest_unread(llm):
    screen = Screen(llm, ["/exit", "never said"])
    assert screen.chat.run() == 0
    assert screen.chat.session.messages == []


def test_no_colours_off_a_terminal(screen, tmp_path):
    screen.say("hello")
    screen.say("/read missing")
    assert "\x1b" not in screen.text


def test_control_characters_of_an_answer_do_not_reach_the_terminal(screen):
    screen.chat._write("a\x1b[31mb\rc\nd")
    assert screen.text == "a\ufffd[31mb\ufffdc\nd"


# Interruptions


def test_an_interrupted_answer_is_kept(llm):
    screen = Screen(llm, interactive=True)
    screen.say("/set max_new_tokens=16")
    screen.chat.session.stream = interrupt_after(screen.chat.session.stream, 2)
    well, text = screen.say("hello")
    assert well
    assert "stopped" in text
    session = screen.chat.session
    assert session.messages[-1]["role"] == "assistant"
    assert 1 <= len(session.last.token_ids) < 16
    del session.stream
    assert "cached)" in screen.say("go on")[1]


def test_an_interrupted_prefill_says_what_is_kept(llm, monkeypatch):
    screen = Screen(llm, interactive=True)
    show = PhaseBar.show

    def interrupt(bar, phase, done, total):
        show(bar, phase, done, total)
        if done == 128:
            raise KeyboardInterrupt

    monkeypatch.setattr(PhaseBar, "show", interrupt)
    well, text = screen.say("x" * 600)
    assert well
    assert "stopped; 128 tokens are kept and reused" in text
    assert screen.chat.session.messages == []
    monkeypatch.undo()
    assert "(128 cached)" in screen.say("x" * 600)[1]


def test_an_interrupted_wait_for_the_index_loses_nothing(llm, tmp_path, monkeypatch):
    def interrupt(session, bar):
        raise KeyboardInterrupt

    (tmp_path / "text").write_text("the cat sat on the mat. " * 12)
    screen = Screen(llm, interactive=True)
    monkeypatch.setattr(chat, "wait_for_indexes", interrupt)
    well, text = screen.say(f"/read {tmp_path}/text")
    assert well
    assert "the text is read" in text
    assert "cached)" in screen.say("where is the cat?")[1]


def test_two_interrupts_at_the_prompt_leave(llm):
    lines = [KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never said"]
    screen = Screen(llm, lines, interactive=True)
    assert screen.chat.run() == 0
    assert screen.text.count("press Ctrl-C again") == 2
    assert len(screen.chat.session.messages) == 2


def test_an_interrupt_ends_a_chat_without_a_person(llm):
    with pytest.raises(KeyboardInterrupt):
        Screen(llm, [KeyboardInterrupt]).chat.run()


# Commands


def test_help_names_every_command(screen):
    from retrieval_attn.terminal.chat import COMMANDS

    text = screen.say("/help")[1]
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_names_the_closest(screen):
    assert screen.say("/staus") == (False, "error: unknown command /staus; did you mean /status? /help lists all\n")


def test_set_changes_options_and_shows_them(screen):
    assert screen.say("/set temperature=0.5 sample_top_k=7")[0]
    assert "max_new_tokens=4 temperature=0.5 top_p=1.0 sample_top_k=7 seed=0" in screen.say("/set")[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("bad=1", "/set: unknown option 'bad'; there are max_new_tokens, temperature, top_p, sample_top_k, seed"),
        ("top_k=7", "unknown option 'top_k'; did you mean top_p or sample_top_k?"),
        ("temperature", "temperature needs a value, as in temperature=0.0"),
        ("sample_top_k=x", "sample_top_k must be a whole number such as 100, got 'x'"),
        ("sample_top_k=-1", "sample_top_k must be 0 (off) or positive, got -1"),
        ("temperature=warm", "temperature must be a number such as 0.98, got 'warm'"),
        ("top_p=7", "top_p must be above 0 and at most 1, got 7.0"),
        ("seed=3 max_new_tokens=0", "max_new_tokens must be at least 1, got 0"),
        ('seed="', "No closing quotation"),
    ],
)
def test_set_refuses_in_one_line_and_changes_nothing(screen, change, reason):
    well, text = screen.say(f"/set {change}")
    assert not well
    assert reason in text
    assert text.count("\n") == 1
    assert screen.chat.sampling == Sampling(max_new_tokens=4)


def test_stats_switches_the_line(screen):
    screen.say("/stats off")
    assert "TTFT" not in screen.say("hello")[1]
    screen.say("/stats")
    assert "TTFT" in screen.say("hello")[1]
    assert "takes on or off" in screen.say("/stats maybe")[1]


def test_system_is_set_before_the_conversation_only(screen):
    assert "no system message" in screen.say("/system")[1]
    screen.say("/system Be brief.")
    assert screen.say("/system")[1] == "Be brief.\n"
    screen.say("hello")
    assert screen.chat.session.llm.decode(screen.chat.session.token_ids).startswith("Be brief.")
    assert "/clear first" in screen.say("/system Be long.")[1]
    screen.say("/clear")
    screen.say('/system ""')
    assert screen.chat.session.system is None


def test_regenerate_replaces_the_answer_and_draws_anew(screen):
    assert "there is no answer" in screen.say("/regen")[1]
    screen.say("/set temperature=2")
    screen.say("hello")
    first = screen.chat.session.last.token_ids
    assert screen.say("/regen")[0]
    assert screen.chat.session.last.token_ids != first
    assert len(screen.chat.session.messages) == 2


def test_clear_forgets(screen):
    screen.say("hello")
    screen.say("/clear")
    assert screen.chat.session.token_ids == []
    assert "(0 cached)" in screen.say("hello")[1]


def test_status_tells_what_there_is(screen):
    screen.say("hello")
    text = screen.say("/status")[1]
    for word in ("llama, float32, cpu", "of 8 192, in 2 messages", "exact: ", "top_k=100", "max_new_tokens=4"):
        assert word in text


# Sessions


def test_save_and_load_give_the_conversation_back(screen):
    screen.say("hello")
    ids = screen.chat.session.token_ids
    assert screen.say("/save one")[0]
    screen.say("/clear")
    assert "one" in screen.say("/sessions")[1]
    assert f"{len(ids)} tokens, 2 messages" in screen.say("/load one")[1]
    assert screen.chat.session.token_ids == ids
    assert f"({len(ids) - 1} cached)" in screen.say("more")[1]
    # Without a name: where it came from.
    assert screen.say("/save")[0]


def test_save_replaces_another_session_only_when_told(llm, screen):
    assert "nothing to save" in screen.say("/save one")[1]
    screen.say("hello")
    screen.say("/save one")
    other = Screen(llm)
    other.say("something else")
    assert "holds another session" in other.say("/save one")[1]
    assert other.say("/save one --force")[0]


@pytest.mark.parametrize("line", ["/load missing", "/load", "/save", "/load a b", '/load ""'])
def test_a_wrong_session_name_is_one_line_and_loses_nothing(screen, line):
    screen.say("hello")
    ids = screen.chat.session.token_ids
    well, text = screen.say(line)
    assert not well
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert screen.chat.session.token_ids == ids


def test_names_with_slashes_or_dots_are_paths(tmp_path):
    assert session_folder("book") == tmp_path / "data" / "retrieval-attn" / "sessions" / "book"
    assert session_folder("a/b") == Path("a/b")
    assert session_folder("~/b") == Path.home() / "b"
    assert session_folder("./b") == Path("b")


# Files


def test_read_prefills_with_a_bar_that_ends_at_100_percent(screen, tmp_path):
    (tmp_path / "a book.txt").write_text("the cat sat on the mat. " * 40)
    well, text = screen.say(f'/read "{tmp_path}/a book.txt"')
    assert well
    assert "100%" in text
    assert "961/961 tok" in text
    assert "building index" in text
    assert "3/3" in text
    assert "961 tokens in" in text
    assert all(memory.far_index.if_built is not None for memory in screen.chat.session.cache.memories)
    assert "(961 cached)" in screen.say("where is the cat?")[1]


def test_a_long_text_is_announced_with_its_memory(screen, tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval_attn.terminal.bar.PLAN_TOKENS", 300)
    (tmp_path / "long.txt").write_text("word " * 60)
    assert "memory for 301 tokens" in screen.say(f"/read {tmp_path}/long.txt")[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x7fELF\0\0\1", "is binary"),
        ("café".encode("latin-1"), "is not utf-8: byte 0xe9 at 3"),
        (b"\xff\xfeA", "is not utf-16"),
    ],
)
def test_unfit_files_are_one_line_and_lose_nothing(screen, tmp_path, content, reason):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    well, text = screen.say(f"/read {tmp_path}/good.txt {tmp_path}/bad.txt")
    assert not well
    assert "bad.txt" in text
    assert reason in text
    assert text.count("\n") == 1
    assert screen.chat.session.token_ids == []


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("", "/read needs a file"),
        ("missing.txt", "there is no file missing.txt"),
        ("/", "/ is a directory"),
        ("/dev/zero", "is a device"),
        ("x --encoding", "--encoding needs a name"),
        ('"x', "No closing quotation"),
    ],
)
def test_read_refuses_in_one_line(screen, rest, reason):
    well, text = screen.say(f"/read {rest}")
    assert not well
    assert reason in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("naïve".encode(), None),
        ("naïve".encode("utf-8-sig"), None),
        ("naïve".encode("utf-16"), None),
        ("naïve".encode("utf-32"), None),
        ("naïve".encode("latin-1"), "latin-1"),
    ],
)
def test_encodings(tmp_path, content, encoding):
    (tmp_path / "text").write_bytes(content)
    assert read_text(str(tmp_path / "text"), encoding) == "naïve"


def test_an_unknown_encoding_is_refused(tmp_path):
    (tmp_path / "text").write_text("x")
    with pytest.raises(ValueError, match="unknown encoding 'klingon'"):
        read_text(str(tmp_path / "text"), "klingon")


# Parts


def test_the_first_piece_waits_for_the_second():
    written = []

    def pieces():
        yield " a"
        written.append("<bar>")
        yield "b"
        yield "c"

    show_answer(written.append, pieces())
    assert written == ["<bar>", "ab", "c", ""]


def test_an_interrupted_stream_is_closed_and_what_came_is_shown():
    written, closed = [], []

    def pieces():
        try:
            yield "a"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        show_answer(written.append, pieces())
    assert written == ["a"]
    assert closed == [True]


def test_statistics_in_words():
    stats = GenerationStats(
        prompt_tokens=131204,
        reused_tokens=131180,
        new_tokens=412,
        ttft_s=0.7,
        tpot_s=0.1,
        visited_fraction=0.019,
        device_kv_bytes=8_000_000,
        host_kv_bytes=20_000_000_000,
        index_bytes=1_300_000_000,
        stop_reason="stop",
    )
    assert stats_line(stats).split(" · ") == [
        "412 tok",
        "10.0 tok/s",
        "TTFT 0.7 s",
        "prompt 131 204 (131 180 cached)",
        "keys read 1.9 %",
        "near 8 MB",
        "host 21.3 GB",
    ]


@pytest.mark.parametrize(("n", "text"), [(0, "0 kB"), (2_500_000, "2 MB"), (21_300_000_000, "21.3 GB")])
def test_sizes(n, text):
    assert size(n) == text
