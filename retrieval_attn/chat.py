"""The chat in the terminal: what is typed becomes a turn or a command, what happens is shown.

Light to import: the model's libraries come with the session that is handed in.
"""

import atexit
import codecs
import difflib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from retrieval_attn import generate
    from retrieval_attn.session import Session

# Failures that a person can do something about; everything else is a bug and keeps its traceback.
REPORTED = (ValueError, OSError, MemoryError, ImportError, RuntimeError)

# Prompts shorter than the first are read without a bar; longer than the second, with a word about memory.
BAR_TOKENS, PLAN_TOKENS = 256, 4096

# Control characters that a model may print, but a terminal must not obey; newline and tab stay.
_HARMLESS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")


def one_line(error: BaseException) -> str:
    """An error's message on a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def count(n: int) -> str:
    """131204 as "131 204"."""
    return f"{n:,}".replace(",", " ")


def size(n_bytes: float) -> str:
    """Bytes for people: "8 MB", "21.3 GB"."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


_ENDINGS = {"": "stopped", "length": "cut at max_new_tokens", "context": "the model's context is full"}


def stats_line(stats: "generate.GenerationStats") -> str:
    """One line about what an answer cost; see `GenerationStats`."""
    parts = [f"{count(stats.new_tokens)} tok"]
    if stats.tpot_s:
        parts.append(f"{1 / stats.tpot_s:.1f} tok/s")
    if stats.new_tokens:
        parts.append(f"TTFT {stats.ttft_s:.1f} s")
    parts.append(f"prompt {count(stats.prompt_tokens)} ({count(stats.reused_tokens)} cached)")
    if share := sparse_share(stats):
        parts.append(share)
    if stats.visited_fraction:
        parts.append(f"keys read {100 * stats.visited_fraction:.1f} %")
    if stats.recovered_mass is not None and stats.recovered_mass < 1:
        parts.append(f"attention found {100 * stats.recovered_mass:.1f} %")
    if stats.verified_error is not None:
        parts.append(f"verified error {100 * stats.verified_error:.1f} %")
    parts.append(f"near {size(stats.device_kv_bytes)}")
    parts.append(f"host {size(stats.host_kv_bytes + stats.index_bytes)}")
    if stats.stop_reason in _ENDINGS:
        parts.append(_ENDINGS[stats.stop_reason])
    return " · ".join(parts)


def sparse_share(stats: "generate.GenerationStats") -> str:
    """How much of the attention matrix a sparse prefill read; empty if it was exact or is not known."""
    if stats.prefill_read is None or stats.prefill_read == 1:
        return ""
    return f"prefill read {100 * stats.prefill_read:.0f} %"


def show_answer(write: Callable[[str], object], pieces: Iterator[str], keep_blanks: bool = False) -> None:
    """Write the pieces of an answer as they come, and close the stream, also when interrupted.

    The first piece waits for the second: between the two, the bar of the index builds may be drawn. It loses its
    leading blanks, which chat templates ask for, unless they are kept.
    """
    held = ""
    with closing(pieces):  # type: ignore[type-var]
        try:
            for i, piece in enumerate(pieces):
                held += piece if i or keep_blanks else piece.lstrip()
                if i:
                    write(held)
                    held = ""
        finally:
            write(held)


class PhaseBar:
    """Draws prefill and index builds on a console; an instance is an `on_progress`. Use it in a `with` block.

    Short prompts get no bar. Off a terminal only the finished bar is printed.
    """

    def __init__(self, console: Console, session: "Session") -> None:
        self._console = console
        self._session = session
        self._bar: Progress | None = None
        self._started = 0.0

    def __enter__(self) -> "PhaseBar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, progress: "generate.Progress") -> None:
        self.show(progress.phase, progress.done, progress.total)

    def show(self, phase: str, done: float, total: int) -> None:
        """`done` of `total` tokens (phase "prefill") or indexes (phase "build"); a phase begins with 0 done."""
        if done == 0:
            self.close()
            self._bar = self._begin(phase, total)
        if self._bar is None:
            return
        self._bar.update(self._bar.task_ids[0], completed=done, note=self._note(phase, done, total))
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, phase: str, total: int) -> Progress | None:
        cached = self._session.cache.get_seq_length()
        if (phase == "prefill" and total < BAR_TOKENS) or cached + total < BAR_TOKENS:
            return None
        if phase == "build" and cached < self._session.llm.config.exact_below:
            return None
        if phase == "prefill" and total >= PLAN_TOKENS:
            plan = f"memory for {self._session.llm.plan(cached + total)}"
            self._console.print(plan, style="dim", highlight=False, soft_wrap=True)
        self._started = time.perf_counter()
        what = "reading" if phase == "prefill" else "building index"
        if phase == "prefill" and cached:
            what += f" ({count(cached)} cached)"
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        bar.add_task(what, total=total, note="")
        bar.start()
        return bar

    def _note(self, phase: str, done: float, total: int) -> str:
        if phase == "build":
            return f"{int(done)}/{total}"
        speed = done / max(time.perf_counter() - self._started, 1e-9)
        return f"{count(int(done))}/{count(total)} tok" + (f" · {count(round(speed))} tok/s" if done else "")


def wait_for_indexes(session: "Session", bar: PhaseBar) -> None:
    """Wait until every far key is indexed. An interrupted wait leaves the builds going on in the background."""
    from retrieval_attn import generate

    session.cache.start_builds()
    generate.follow_builds(session.cache, bar)


# The longer marks first: UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(name: str, encoding: str | None = None) -> str:
    """The text of a file: UTF-8, what its byte order mark says, or `encoding`.

    Raises OSError or ValueError, naming the file and the reason, if it cannot be read, is empty, or is not text.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a directory; name the files in it")
    if path.exists() and not (path.is_file() or path.is_fifo()):
        raise ValueError(f"{name} is a device, not a file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name}") from None
    except OSError as error:
        raise type(error)(f"{name} cannot be read: {error.strerror}") from error
    text = _decode(name, raw, encoding).replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{name} is empty; there is nothing to read")
    return text


def _decode(name: str, raw: bytes, encoding: str | None) -> str:
    marked = next((kind for mark, kind in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)
    chosen = encoding or marked or "utf-8"
    if not encoding and not marked and b"\0" in raw:
        raise ValueError(f"{name} is binary, not text (it holds zero bytes)")
    try:
        return raw.decode(chosen)
    except LookupError:
        raise ValueError(f"unknown encoding {chosen!r}; try utf-8, utf-16, latin-1 or cp1252") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {chosen}: byte 0x{raw[error.start]:02x} at {error.start}; name its encoding "
            f"(--encoding latin-1) or convert it (iconv -f latin1 -t utf-8 {shlex.quote(name)} > new.txt)"
        ) from None


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default).expanduser() / "retrieval-attn"


def sessions_home() -> Path:
    """Where sessions with a plain name are saved."""
    return _xdg("XDG_DATA_HOME", "~/.local/share") / "sessions"


def session_folder(name: str) -> Path:
    """The folder of a session: a path if `name` looks like one, else of that name among the saved sessions."""
    if not name.strip():
        raise ValueError("a session needs a name or a folder")
    if "/" in name or name.startswith(("~", ".")):
        return Path(name).expanduser()
    return sessions_home() / name


def is_session(folder: Path) -> bool:
    """Whether a session was saved there."""
    return (folder / "manifest.json").is_file()


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def remember_lines() -> None:
    """Let `input` edit lines and recall those of earlier chats, where the system can."""
    try:
        import readline

        path = _xdg("XDG_STATE_HOME", "~/.local/state") / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(1000)
        if path.exists():
            readline.read_history_file(path)
        atexit.register(_write_history, path)
    except (ImportError, OSError):
        return


def _write_history(path: Path) -> None:
    import readline

    try:
        readline.write_history_file(path)
    except OSError:
        return


class Chat:
    """A conversation in a terminal. One line is one turn, or a command if it begins with "/".

    session: what is talked to. console: where answers go; notes: where bars, statistics and errors go, by default the
    same. options: how answers are generated, as in `LLM.generate`. folder: where /save and /load without a name go.
    read_line: gives the next line, raises EOFError at the end; by default standard input. interactive: whether a person
    types; else no prompt is shown, Ctrl-C ends the chat, and `run` reports failed turns.
    """

    def __init__(
        self,
        session: "Session",
        console: Console,
        *,
        notes: Console | None = None,
        options: dict[str, Any] | None = None,
        stats: bool = True,
        folder: Path | None = None,
        interactive: bool = False,
        read_line: Callable[[], str] | None = None,
    ) -> None:
        self.session = session
        self.console = console
        self.notes = notes or console
        self.options = options or {}
        self.stats = stats
        self.folder = folder
        self.interactive = interactive
        self.read_line = read_line or (lambda: input("> " if interactive else ""))
        self.leaving = False
        self._retries = 0

    def run(self) -> int:
        """Take lines until they end or /exit; returns 1 if a turn failed and no person was there to see it, else 0."""
        failed, interrupted = False, False
        try:
            while not self.leaving:
                try:
                    line = self.read_line()
                except EOFError:
                    if self.interactive:
                        self._note("")
                    break
                except KeyboardInterrupt:
                    if interrupted or not self.interactive:
                        raise
                    interrupted = True
                    self._note("\npress Ctrl-C again to leave, or type /exit")
                    continue
                interrupted = False
                failed |= not self.take(line)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._note("")
        finally:
            self.session.cache.cancel_builds()
        return int(failed and not self.interactive)

    def take(self, line: str) -> bool:
        """One line: a command, a turn, or nothing. Returns whether it went well; errors are printed, not raised."""
        return self.attempt(lambda: self._command(line) if line.startswith("/") else self.ask(line.strip()))

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do something that may fail or be interrupted, without losing the conversation."""
        try:
            work()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._note(f"stopped; {count(self.session.cache.get_seq_length())} tokens are kept and reused")
        except REPORTED as error:
            if os.environ.get("RETRIEVAL_ATTN_DEBUG") == "1":
                raise
            self.notes.print(f"error: {one_line(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
            return False
        return True

    def ask(self, text: str) -> None:
        """Answer a turn, if there is one."""
        if text:
            self._retries = 0
            self._answer(lambda **options: self.session.stream(text, **options))

    def read(self, texts: dict[str, str]) -> None:
        """Read texts, given by name, into the conversation."""
        for name, text in texts.items():
            started, before = time.perf_counter(), len(self.session.token_ids)
            with PhaseBar(self.notes, self.session) as bar:
                stats = self.session.read(text, on_progress=bar)
                seconds = time.perf_counter() - started
                n_tokens = len(self.session.token_ids) - before
                parts = [f"read {name}: {count(n_tokens)} tokens in {seconds:.1f} s", sparse_share(stats)]
                self._note(" · ".join(filter(None, parts)))
                self._wait(bar)

    def _wait(self, bar: PhaseBar) -> None:
        """Wait for the indexes, as long as the person likes: the text is read by now."""
        try:
            wait_for_indexes(self.session, bar)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            bar.close()
            self._note("the text is read; the rest of the index is built in the background")

    def _answer(self, stream: Callable[..., Iterator[str]]) -> None:
        """Show an answer and what it cost. An interrupted answer is kept as far as it went."""
        stopped = False
        with PhaseBar(self.notes, self.session) as bar:
            pieces = stream(on_progress=bar, **self._sampling())
            try:
                show_answer(self._write, pieces)
            except KeyboardInterrupt:
                last = self.session.last
                if not self.interactive or last is None or not last.token_ids:
                    raise
                stopped = True
            finally:
                self._write("\n")
        if (self.stats or stopped) and self.session.last is not None:
            self._note(stats_line(self.session.last.stats))

    def _sampling(self) -> dict[str, Any]:
        """The options of this answer; another try draws other tokens."""
        return self.options | ({"seed": self.options.get("seed", 0) + self._retries} if self._retries else {})

    def _write(self, text: str) -> None:
        self.console.out(text.translate(_HARMLESS), end="", highlight=False)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            closest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
            raise ValueError(f"unknown command {name}; did you mean {closest}? /help lists all")
        command.run(self, rest.strip())

    def _help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self._print(f"{name + ' ' + command.arguments:34}{command.does}")
        self._print("A line that begins with a blank is a turn, even if a / follows. Ctrl-C stops an answer.")

    def _exit(self, rest: str) -> None:
        self.leaving = True

    def _read(self, rest: str) -> None:
        names, encoding = _words("/read", rest), None
        if "--encoding" in names:
            at = names.index("--encoding")
            encoding, names = (names[at + 1 : at + 2] or [""])[0], names[:at] + names[at + 2 :]
            if not encoding:
                raise ValueError("--encoding needs a name, such as latin-1")
        if not names:
            raise ValueError("/read needs a file: /read FILE... [--encoding NAME]")
        # All files are opened before one is read: a wrong name changes nothing.
        self.read({name: read_text(name, encoding) for name in names})

    def _regen(self, rest: str) -> None:
        self._retries += 1
        self._answer(self.session.regenerate)

    def _clear(self, rest: str) -> None:
        self.session.clear()
        self._note("the conversation is forgotten")

    def _system(self, rest: str) -> None:
        if not rest:
            self._print(self.session.system or "no system message is set")
            return
        if self.session.token_ids:
            raise ValueError("the system message stands at the beginning of a conversation; /clear first")
        self.session.system = None if rest in ('""', "''") else rest

    def _set(self, rest: str) -> None:
        if rest:
            self.options = changed_options(self.options, _words("/set", rest))
        self._print(" ".join(f"{name}={value}" for name, value in current_options(self.options).items()))

    def _stats(self, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise ValueError(f"/stats takes on or off, got {rest!r}")
        self.stats = rest == "on" if rest else not self.stats
        self._note(f"statistics are {'on' if self.stats else 'off'}")

    def _status(self, rest: str) -> None:
        for name, value in status(self.session).items():
            self._print(f"{name:12}{value}")
        self._print(f"{'answers':12}" + " ".join(f"{k}={v}" for k, v in current_options(self.options).items()))

    def _save(self, rest: str) -> None:
        names = _words("/save", rest)
        force = "--force" in names
        names = [name for name in names if name != "--force"]
        folder = self._folder("/save", names)
        if not self.session.token_ids:
            raise ValueError("there is nothing to save yet")
        if is_session(folder) and folder != self.folder and not force:
            raise FileExistsError(f"{folder} holds another session; choose another name, or add --force to replace it")
        with self.notes.status(f"saving to {folder}"):
            self.session.save(folder)
        self.folder = folder
        self._note(f"saved to {folder} ({size(_folder_bytes(folder))})")

    def _load(self, rest: str) -> None:
        folder = self._folder("/load", _words("/load", rest))
        with self.notes.status(f"loading {folder}"):
            restored = self.session.llm.restore(folder)
        self.session.cache.cancel_builds()
        self.session, self.folder = restored, folder
        self._note(f"loaded {folder}: {count(len(restored.token_ids))} tokens, {len(restored.messages)} messages")

    def _folder(self, command: str, names: Sequence[str]) -> Path:
        if len(names) > 1 or not (names or self.folder):
            raise ValueError(f"{command} needs one name: {command} NAME")
        folder = session_folder(names[0]) if names else self.folder
        assert folder is not None
        return folder

    def _sessions(self, rest: str) -> None:
        home = sessions_home()
        # Hidden folders are what a save that was killed left behind.
        folders = [path for path in home.iterdir() if not path.name.startswith(".")] if home.is_dir() else []
        found = sorted(filter(is_session, folders))
        for folder in found:
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "manifest.json").stat().st_mtime))
            self._print(f"{folder.name:34}{size(_folder_bytes(folder)):>9}  {saved}")
        if not found:
            self._note(f"no sessions in {home}")


class Command(NamedTuple):
    """What follows a command's name, what it does, and the method that does it, given what follows."""

    arguments: str
    does: str
    run: Callable[[Chat, str], None]


COMMANDS = {
    "/read": Command("FILE... [--encoding NAME]", "read files into the conversation, now", Chat._read),
    "/regen": Command("", "answer the last turn again", Chat._regen),
    "/clear": Command("", "forget the conversation", Chat._clear),
    "/system": Command("[TEXT]", 'show or set the system message; "" removes it', Chat._system),
    "/set": Command("[NAME=VALUE...]", "show or change how answers are generated", Chat._set),
    "/status": Command("", "model, tokens, memory, index and options", Chat._status),
    "/stats": Command("[on|off]", "a line of statistics after every answer", Chat._stats),
    "/save": Command("[NAME|FOLDER] [--force]", "save the conversation with its keys and indexes", Chat._save),
    "/load": Command("[NAME|FOLDER]", "go on with a saved conversation", Chat._load),
    "/sessions": Command("", "list saved conversations", Chat._sessions),
    "/help": Command("", "this list", Chat._help),
    "/exit": Command("", "leave (also Ctrl-D)", Chat._exit),
}


def _words(command: str, rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"{command}: {error}; put names with blanks or quotes in double quotes") from None


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """All generation options with their values, defaults included."""
    from retrieval_attn.generate import Sampling

    return asdict(Sampling(**options))


def changed_options(options: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """The options after "name=value" changes, all or none. Raises ValueError with the names or the rule."""
    from retrieval_attn.generate import Sampling

    kinds = {field.name: field.type for field in fields(Sampling)}
    new = dict(options)
    for change in changes:
        name, equals, value = change.partition("=")
        if name not in kinds or not equals:
            raise ValueError(f"cannot set {change!r}; the options are {', '.join(f'{known}=...' for known in kinds)}")
        try:
            new[name] = int(value) if kinds[name] is int else float(value)
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"{name} must be {kind}, got {value!r}") from None
    Sampling(**new)
    return new


def status(session: "Session") -> dict[str, str]:
    """What a conversation consists of, by name."""
    llm, memories = session.llm, session.cache.memories
    built = [memory.far_index.if_built for memory in memories]
    config = {name: value for name, value in asdict(llm.config).items() if value is not None}
    return {
        "model": f"{llm.model.config.name_or_path} ({llm.model.config.model_type}, {llm.model.dtype}, "
        f"{llm.model.device})".replace("torch.", ""),
        "tokens": f"{count(len(session.token_ids))} of {count(llm.max_tokens)}, in {len(session.messages)} messages",
        "memory": f"{size(sum(memory.store.nbytes for memory in memories))} of keys and values on the host, "
        f"{size(sum(memory.window.nbytes for memory in memories))} near",
        "index": f"{llm.config.index}: {sum(index is not None for index in built)} of {len(memories)} built, "
        f"{size(sum(index.nbytes for index in built if index))}",
        "config": " ".join(f"{name}={value}" for name, value in config.items()),
        "system": json.dumps(session.system, ensure_ascii=False),
    }


def is_a_person(stream: Any = None) -> bool:
    """Whether someone types at a terminal."""
    return (stream or sys.stdin).isatty()
