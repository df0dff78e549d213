"""The chat in the terminal: what is typed becomes a turn or a command, what happens is shown.

Light to import: the model's libraries come with the session that is handed in.
"""

import difflib
import json
import os
import shlex
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from retrieval_attn.config import Sampling
from retrieval_attn.terminal.bar import PhaseBar, wait_for_indexes
from retrieval_attn.terminal.files import (
    folder_bytes,
    is_session,
    read_text,
    remember_lines,
    session_folder,
    sessions_home,
)
from retrieval_attn.terminal.option_language import made, parse_pairs, words_of
from retrieval_attn.terminal.shown import (
    HARMLESS,
    REPORTED,
    count,
    one_line,
    show_answer,
    size,
    sparse_share,
    stats_line,
)

if TYPE_CHECKING:
    from retrieval_attn.session import Session


class Chat:
    """A conversation in a terminal. One line is one turn, or a command if it begins with "/".

    session: what is talked to. console: where answers go; notes: where bars, statistics and errors go, by default the
    same. sampling: how answers are generated. folder: where /save and /load without a name go.
    read_line: gives the next line, raises EOFError at the end; by default standard input. interactive: whether a person
    types; else no prompt is shown, Ctrl-C ends the chat, and `run` reports failed turns.
    """

    def __init__(
        self,
        session: "Session",
        console: Console,
        *,
        notes: Console | None = None,
        sampling: Sampling | None = None,
        stats: bool = True,
        folder: Path | None = None,
        interactive: bool = False,
        read_line: Callable[[], str] | None = None,
    ) -> None:
        self.session = session
        self.console = console
        self.notes = notes or console
        self.sampling = sampling or Sampling()
        self.stats = stats
        self.folder = folder
        self.interactive = interactive
        self.read_line = read_line or (lambda: input("> " if interactive else ""))
        self.leaving = False
        self._retries = 0

    def converse(self, texts: dict[str, str]) -> int:
        """Read texts, given by name, then take lines; returns what `run` does, and 1 if a text could not be read."""
        if self.interactive:
            remember_lines()
            self._note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        if texts and not self.attempt(lambda: self.read(texts)) and not self.interactive:
            return 1
        return self.run()

    def ask_once(self, texts: dict[str, str], prompt: str) -> None:
        """Read texts, ask one thing about them, and save the session if it has a folder. Errors are raised."""
        if not prompt.strip():
            raise ValueError("--prompt is empty; say something")
        try:
            self.read(texts)
            self.ask(prompt)
            if self.folder is not None:
                self.session.save(self.folder)
        finally:
            self.session.cache.cancel_builds()

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

    def _answer(self, stream: Callable[..., Generator[str, None, None]]) -> None:
        """Show an answer and what it cost. An interrupted answer is kept as far as it went."""
        stopped = False
        with PhaseBar(self.notes, self.session) as bar:
            # Another try draws other tokens.
            drawn = replace(self.sampling, seed=self.sampling.seed + self._retries)
            pieces = stream(on_progress=bar, **asdict(drawn))
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

    def _write(self, text: str) -> None:
        self.console.out(text.translate(HARMLESS), end="", highlight=False)

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
            self.sampling = changed(self.sampling, _words("/set", rest))
        self._print(in_words(self.sampling))

    def _stats(self, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise ValueError(f"/stats takes on or off, got {rest!r}")
        self.stats = rest == "on" if rest else not self.stats
        self._note(f"statistics are {'on' if self.stats else 'off'}")

    def _status(self, rest: str) -> None:
        for name, value in status(self.session).items():
            self._print(f"{name:12}{value}")
        self._print(f"{'answers':12}{in_words(self.sampling)}")

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
        self._note(f"saved to {folder} ({size(folder_bytes(folder))})")

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
            self._print(f"{folder.name:34}{size(folder_bytes(folder)):>9}  {saved}")
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


def in_words(sampling: Sampling) -> str:
    """All options of answers with their values, as /set takes them."""
    return " ".join(f"{word.name}={getattr(sampling, word.field)}" for word in words_of(Sampling).values())


def changed(sampling: Sampling, pairs: Sequence[str]) -> Sampling:
    """The options after "name=value" changes, all or none; ValueError in one line."""
    return made(Sampling, parse_pairs(pairs, words_of(Sampling), "/set"), asdict(sampling))


def status(session: "Session") -> dict[str, str]:
    """What a conversation consists of, by name."""
    llm, memories = session.llm, session.cache.memories
    built = [memory.far_index.if_built for memory in memories]
    config = {name: value for name, value in asdict(llm.config).items() if value is not None}
    kind = filter(None, (llm.model.config.model_type, llm.weights, str(llm.model.dtype), str(llm.model.device)))
    return {
        "model": f"{llm.model.config.name_or_path} ({', '.join(kind)})".replace("torch.", ""),
        "tokens": f"{count(len(session.token_ids))} of {count(llm.max_tokens)}, in {len(session.messages)} messages",
        "memory": f"{size(sum(memory.store.nbytes for memory in memories))} of keys and values on the host, "
        f"{size(sum(memory.window.nbytes for memory in memories))} near",
        "index": f"{llm.config.index}: {sum(index is not None for index in built)} of {len(memories)} built, "
        f"{size(sum(index.nbytes for index in built if index))}",
        "config": " ".join(f"{name}={value}" for name, value in config.items()),
        "system": json.dumps(session.system, ensure_ascii=False),
    }
