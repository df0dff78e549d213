"""A conversation: token ids are its truth, and only what is new is run."""

import copy
import logging
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.detokeniser import Detokeniser
from retrieval_attn.generate import Completion, GenerationStats, OnProgress, Request
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.plan.plan import MemoryPlan
from retrieval_attn.saving.session_files import save_session
from retrieval_attn.saving.session_state import SessionState
from retrieval_attn.threads.one_at_a_time import OneAtATime

log = logging.getLogger("retrieval_attn")

# Stand-ins that a chat template is rendered with, to find the text around them.
_MARK = "QQQmarkQQQ"
_REPLY = "QQQreplyQQQ"

# What stands between the texts of one user turn.
_BETWEEN = "\n\n"

_BUSY = "the session is at work, in another thread or around this call; wait for it, or fork() the session"


class ConversationModel(Protocol):
    """What a session, and whoever shows one, asks of a model; `LLM` is one."""

    model: Any
    tokenizer: Any
    config: RetrievalConfig
    weights: str

    @property
    def max_tokens(self) -> int: ...

    def encode(self, prompt: str | list[int]) -> list[int]: ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str: ...

    def stop_ids(self) -> list[int]: ...

    def plan(self, n_tokens: int) -> MemoryPlan: ...

    def new_cache(self) -> RetrievalCache: ...

    def request(self, cache: RetrievalCache, on_progress: OnProgress | None, sampling: dict[str, Any]) -> Request: ...

    def restore(self, directory: str | Path) -> "Session": ...


class Around(NamedTuple):
    """What a chat template puts before and after the text of a user's turn, and before an answer that stands in the
    history where `after` has called for one."""

    before: str
    after: str
    lead: str = ""


def turn_frame(llm: ConversationModel, system: str | None, first: bool) -> Around:
    """What the model's chat template puts around a user's turn: the first, or one after an answer.

    Raises ValueError for a model without a template, or one that changes what is said.
    """
    history = [{"role": "system", "content": system}] if system else []
    asked = {"role": "user", "content": _MARK}
    if first:
        before, after = _split(llm.render([*history, asked], add_generation_prompt=True))
        return Around(before, after)
    history += [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]
    before, after = _split(llm.render([*history, asked], add_generation_prompt=True))
    told, _, before = before.rpartition(_REPLY)
    # The call for the answer to "?" stands before the lead; some templates call otherwise than they tell.
    return Around(before, after, told.rpartition(after)[2] if after and after in told else "")


def _split(rendered: str) -> list[str]:
    if rendered.count(_MARK) != 1:
        raise ValueError("the chat template does not render a user's text exactly once; use token ids instead")
    return rendered.split(_MARK)


class Session:
    """Many turns over one KV cache. Made by `LLM.session` or `LLM.restore`.

    Generated ids are kept as they are, never re-encoded, so the cached prefix always fits. An interrupted or failed
    turn loses nothing: the conversation stays what it was (with what was answered so far), and tokens that were
    prefilled are reused if they are asked again; with windows or recurrent layers, those up to the last mark (see
    `RetrievalCache.mark`).

    One answer is under way at a time: `ask`, `stream`, `read`, `regenerate`, `answer`, `save`, `fork` and `clear` end a
    stream that is still open, and what it has said is kept as if it had been closed. Such a call raises RuntimeError
    while another is at work, in another thread or around a progress callback; use forks in other threads.
    """

    def __init__(self, llm: ConversationModel, system: str | None = None, cache: RetrievalCache | None = None) -> None:
        self.llm = llm
        self.system = system
        self.cache = llm.new_cache() if cache is None else cache
        self.messages: list[dict[str, str]] = []
        self.last: Completion | None = None
        self._token_ids: list[int] = []
        self._cached: list[int] = []  # of their beginning the cache holds the keys, however far a request has come
        self._answer_start: int | None = None
        self._turn_open = False
        self._open: weakref.ref[Generator[str, None, None]] | None = None
        self._turns = OneAtATime(_BUSY)

    @classmethod
    def resumed(cls, llm: ConversationModel, cache: RetrievalCache, state: SessionState) -> "Session":
        """The conversation whose `state` this is; the cache holds the keys of the state's `cached_ids`."""
        session = cls(llm, state.system, cache)
        session._cached = list(state.cached_ids)
        session._token_ids, session.messages = list(state.token_ids), list(state.messages)
        session._answer_start, session._turn_open = state.answer_start, state.turn_open
        return session

    def state(self) -> SessionState:
        """What this conversation is besides its keys, values and indexes."""
        return SessionState(
            system=self.system,
            messages=tuple(self.messages),
            token_ids=tuple(self._token_ids),
            cached_ids=tuple(self._held()),
            answer_start=self._answer_start,
            turn_open=self._turn_open,
        )

    @property
    def token_ids(self) -> list[int]:
        """The ids of all that was said, those that an open stream has drawn by now too; a copy."""
        return list(self._token_ids)

    @token_ids.setter
    def token_ids(self, ids: list[int]) -> None:
        self._token_ids = list(ids)

    def ask(self, text: str, *, on_progress: OnProgress | None = None, **sampling: Any) -> Completion:
        """Answer a user's turn, after everything said before; options as in `LLM.generate`."""
        for _ in self.stream(text, on_progress=on_progress, **sampling):
            pass
        assert self.last is not None
        return self.last

    def stream(
        self, text: str, *, on_progress: OnProgress | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """As `ask`, but yields the answer piece by piece."""
        if not text:
            raise ValueError("the question is empty; say something")
        with self._alone():
            around = self._around_turn()
            ids = self._extended(around.before + text + around.after)
            return self._opened(self._stream_turn(ids, self._with_user_text(text), on_progress, sampling))

    def read(self, text: str, *, on_progress: OnProgress | None = None) -> GenerationStats:
        """Put a text into the user's turn and prefill it now; the question comes with the next `ask`.

        Returns what that cost.
        """
        if not text.strip():
            raise ValueError("the text is empty; there is nothing to read")
        with self._alone():
            ids = self._extended(self._around_turn().before + text)
            request = self._begin(ids, on_progress, {})
            request.read(ids)
            self._put_unanswered(text, ids)
            return request.stats

    def regenerate(self, *, on_progress: OnProgress | None = None, **sampling: Any) -> Generator[str, None, None]:
        """Answer the last turn again; yields the new answer, which replaces the old one.

        A text that was read after the old answer stands after the new one.
        """
        with self._alone():
            if self._answer_start is None:
                raise ValueError("there is no answer to regenerate; ask something first")
            unanswered = self.messages[-1]["content"] if self._turn_open else ""
            asked = self.messages[:-1] if unanswered else self.messages
            if asked and asked[-1]["role"] == "assistant":
                asked = asked[:-1]
            ids = self._token_ids[: self._answer_start]
            return self._opened(self._stream_turn(ids, asked, on_progress, sampling, unanswered))

    def fork(self) -> "Session":
        """An independent session that goes on from here: what was read is shared, copy-on-write, and not read again.

        So many questions can be asked of one document, none seeing the others. Waits for index builds that are under
        way. Forks may go on in threads of their own.
        """
        with self._alone():
            self._mend()
            twin = copy.copy(self)
            twin.cache = self.cache.fork()
            twin._turns = OneAtATime(_BUSY)
            # Lists are replaced when a session goes on, and changed by an open stream alone.
            return twin

    def clear(self) -> None:
        """Forget the whole conversation."""
        with self._alone():
            self.cache.cancel_builds()
            self.cache = self.llm.new_cache()
            self._token_ids, self.messages, self._cached = [], [], []
            self.last, self._answer_start, self._turn_open = None, None, False

    def answer(self, ids: list[int], *, on_progress: OnProgress | None = None, **sampling: Any) -> Completion:
        """Continue a token sequence that stands for the whole conversation so far."""
        for _ in self.stream_answer(ids, on_progress=on_progress, **sampling):
            pass
        assert self.last is not None
        return self.last

    def stream_answer(
        self, ids: list[int], *, on_progress: OnProgress | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """As `answer`, but yields pieces of text. What the cache holds of `ids` is not run again."""
        with self._alone():
            return self._opened(self._stream_answer(ids, on_progress, sampling))

    def _stream_answer(
        self, ids: list[int], on_progress: OnProgress | None, sampling: dict[str, Any]
    ) -> Generator[str, None, None]:
        with self._turns.taken():
            request = self._begin(ids, on_progress, sampling)
        tokens, text, pieces = request.tokens(ids), self._cached, Detokeniser(self.llm.decode)
        try:
            while (token := self._next(tokens)) is not None:
                text.append(token)
                self._put_answered(text, len(ids))
                if piece := pieces.add(token):
                    yield piece
            if piece := pieces.flush():
                yield piece
        finally:
            tokens.close()
            pieces.flush()
            if len(text) > len(ids):
                # Once more: an interruption may have come between.
                self._put_answered(text, len(ids))
            self.last = Completion(pieces.text, text[len(ids) :], request.stats)

    def _next(self, tokens: Iterator[int]) -> int | None:
        with self._turns.taken():
            return next(tokens, None)

    def _stream_turn(
        self,
        ids: list[int],
        asked: list[dict[str, str]],
        on_progress: OnProgress | None,
        sampling: dict[str, Any],
        unanswered: str = "",
    ) -> Generator[str, None, None]:
        """Answer, and remember the turn once there is an answer, if only its first token.

        unanswered: a text that stands after the answer, to be read with the question that follows it.
        """
        self.last = None
        try:
            yield from self._stream_answer(ids, on_progress, sampling)
        finally:
            last: Completion | None = self.last
            if last is not None and last.token_ids:
                self.messages = [*asked, {"role": "assistant", "content": last.text}]
                if unanswered:
                    self._put_unanswered(unanswered, self._extended(self._around_turn().before + unanswered))

    def _put_answered(self, text: list[int], start: int) -> None:
        """The conversation's ids end with an answer, which begins at `start`."""
        self._token_ids, self._answer_start, self._turn_open = text, start, False

    def _put_unanswered(self, text: str, ids: list[int]) -> None:
        """A text of the user's turn that no answer has followed yet; ids: of the conversation up to its end."""
        self.messages = self._with_user_text(text)
        self._token_ids, self._turn_open = ids, True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, nobody else changes the session: a stream that is open is ended first, and a call beside this one is
        an error."""
        with self._turns.taken():
            stream = None if self._open is None else self._open()
            if stream is not None:
                stream.close()
            self._open = None
            yield

    def _opened(self, stream: Generator[str, None, None]) -> Generator[str, None, None]:
        self._open = weakref.ref(stream)
        return stream

    def save(self, directory: str | Path) -> None:
        """Write the conversation with its keys, values and indexes to a new folder; see `LLM.restore`."""
        with self._alone():
            self._mend()
            save_session(Path(directory), self.state(), self.cache, self.llm.model)

    def _begin(self, ids: list[int], on_progress: OnProgress | None, sampling: dict[str, Any]) -> Request:
        """Check what is asked, drop what the cache holds beyond the common prefix, and make the request.

        From here on `_cached` begins with `ids`.
        """
        self._mend()
        request = self.llm.request(self.cache, on_progress, sampling)
        self.llm.encode(ids)
        self.llm.plan(len(ids) + request.sampling.max_new_tokens).check(already=self._bytes_held())
        held = self._held()
        keep = min(_common_prefix(ids, held), len(ids) - 1)
        if keep < len(held):
            self._go_back(keep)
        request.cache, self._cached = self.cache, list(ids)
        return request

    def _held(self) -> list[int]:
        """The ids whose keys the cache holds."""
        return self._cached[: self.cache.get_seq_length()]

    def _bytes_held(self) -> int:
        indexes = (memory.far_index.if_built for memory in self.cache.memories)
        stored = sum(memory.store.nbytes for memory in self.cache.memories) + self.cache.marked_bytes
        return stored + sum(index.nbytes for index in indexes if index is not None)

    def _mend(self) -> None:
        """After an interruption, wherever it struck: all layers hold the same tokens."""
        self.cache.settle()
        if self.cache.spoiled:
            log.warning("the last turn was interrupted where this model cannot go back; prefilling anew")
            self.cache = self.llm.new_cache()

    def _go_back(self, keep: int) -> None:
        """Drop all but the first `keep` of what the cache holds, or more if a layer cannot go back to just these."""
        reached = self.cache.reachable(keep) or keep
        try:
            self.cache.crop(reached - self.cache.get_seq_length())
        except ValueError as reason:
            log.warning("prefilling anew: %s", reason)
            self.cache = self.llm.new_cache()

    def _with_user_text(self, text: str) -> list[dict[str, str]]:
        """The messages, with a text added to the user's open turn or as a new one."""
        if not self._turn_open:
            return [*self.messages, {"role": "user", "content": text}]
        return [*self.messages[:-1], {"role": "user", "content": self.messages[-1]["content"] + _BETWEEN + text}]

    def _extended(self, text: str) -> list[int]:
        """The conversation's ids followed by those of a text; a stop token that already stands there is not doubled."""
        said = self._token_ids
        new = self.llm.encode_text(text) if said or self._has_template else self.llm.encode(text)
        if said and new and new[0] == said[-1] and new[0] in self.llm.stop_ids():
            new = new[1:]
        return said + new

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.llm.tokenizer, "chat_template", None))

    def _around_turn(self) -> Around:
        """What comes before and after the user's next text: the template's, or a blank line within an open turn."""
        if not self._has_template:
            return Around(_BETWEEN if self._turn_open else "", "")
        around = turn_frame(self.llm, self.system, first=self._turn_open or not self._token_ids)
        return around._replace(before=_BETWEEN) if self._turn_open else around


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
