"""A conversation: token ids are its truth, and only what is new is run."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import Completion, GenerationStats, OnProgress, Request
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.plan.plan import MemoryPlan
from retrieval_attn.saving.session_files import save_session
from retrieval_attn.saving.session_state import SessionState

log = logging.getLogger("retrieval_attn")

# Stand-ins that a chat template is rendered with, to find the text around them.
_MARK = "QQQmarkQQQ"
_REPLY = "QQQreplyQQQ"

# What stands between the texts of one user turn.
_BETWEEN = "\n\n"


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
    `RetrievalCache.mark`). Not for use from two threads at once.
    """

    def __init__(self, llm: ConversationModel, system: str | None = None, cache: RetrievalCache | None = None) -> None:
        self.llm = llm
        self.system = system
        self.cache = llm.new_cache() if cache is None else cache
        self.token_ids: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.last: Completion | None = None
        self._cached: list[int] = []  # the ids whose keys the cache holds
        self._answer_start: int | None = None
        self._turn_open = False

    @classmethod
    def resumed(cls, llm: ConversationModel, cache: RetrievalCache, state: SessionState) -> "Session":
        """The conversation whose `state` this is; the cache holds the keys of the state's `cached_ids`."""
        session = cls(llm, state.system, cache)
        session._cached = list(state.cached_ids)
        session.token_ids, session.messages = list(state.token_ids), list(state.messages)
        session._answer_start, session._turn_open = state.answer_start, state.turn_open
        return session

    def state(self) -> SessionState:
        """What this conversation is besides its keys, values and indexes."""
        return SessionState(
            system=self.system,
            messages=tuple(self.messages),
            token_ids=tuple(self.token_ids),
            cached_ids=tuple(self._cached),
            answer_start=self._answer_start,
            turn_open=self._turn_open,
        )

    def ask(self, text: str, *, on_progress: OnProgress | None = None, **sampling: Any) -> Completion:
        """Answer a user's turn, after everything said before; options as in `LLM.generate`."""
        for _ in self.stream(text, on_progress=on_progress, **sampling):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str, *, on_progress: OnProgress | None = None, **sampling: Any) -> Iterator[str]:
        """As `ask`, but yields the answer piece by piece."""
        if not text:
            raise ValueError("the question is empty; say something")
        around = self._around_turn()
        ids = self._extended(around.before + text + around.after)
        return self._stream_turn(ids, self._with_user_text(text), on_progress, sampling)

    def read(self, text: str, *, on_progress: OnProgress | None = None) -> GenerationStats:
        """Put a text into the user's turn and prefill it now; the question comes with the next `ask`.

        Returns what that cost.
        """
        if not text.strip():
            raise ValueError("the text is empty; there is nothing to read")
        ids = self._extended(self._around_turn().before + text)
        request = self._begin(ids, on_progress, {})
        try:
            request.read(ids)
        finally:
            self._cached = ids[: self.cache.get_seq_length()]
        self.messages = self._with_user_text(text)
        self.token_ids, self._turn_open = ids, True
        return request.stats

    def regenerate(self, *, on_progress: OnProgress | None = None, **sampling: Any) -> Iterator[str]:
        """Answer the last turn again; yields the new answer, which replaces the old one."""
        if self._answer_start is None:
            raise ValueError("there is no answer to regenerate; ask something first")
        asked = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages
        return self._stream_turn(self.token_ids[: self._answer_start], asked, on_progress, sampling)

    def fork(self) -> "Session":
        """An independent session that goes on from here: what was read is shared, copy-on-write, and not read again.

        So many questions can be asked of one document, none seeing the others. Waits for index builds that are under
        way. Forks may go on in threads of their own.
        """
        self._mend()
        twin = copy.copy(self)
        twin.cache = self.cache.fork()
        # Lists are replaced as a session goes on, never changed.
        return twin

    def clear(self) -> None:
        """Forget the whole conversation."""
        self.cache.cancel_builds()
        self.cache = self.llm.new_cache()
        self.token_ids, self.messages, self._cached = [], [], []
        self.last, self._answer_start, self._turn_open = None, None, False

    def answer(self, ids: list[int], *, on_progress: OnProgress | None = None, **sampling: Any) -> Completion:
        """Continue a token sequence that stands for the whole conversation so far."""
        for _ in self.stream_answer(ids, on_progress=on_progress, **sampling):
            pass
        assert self.last is not None
        return self.last

    def stream_answer(self, ids: list[int], *, on_progress: OnProgress | None = None, **sampling: Any) -> Iterator[str]:
        """As `answer`, but yields pieces of text. What the cache holds of `ids` is not run again."""
        request = self._begin(ids, on_progress, sampling)
        answer: list[int] = []
        pieces = _Detokeniser(self.llm.decode)
        tokens = request.tokens(ids)
        try:
            for token in tokens:
                answer.append(token)
                self.token_ids, self._answer_start, self._turn_open = ids + answer, len(ids), False
                if piece := pieces.add(token):
                    yield piece
            if piece := pieces.flush():
                yield piece
        finally:
            tokens.close()
            self._cached = (ids + answer)[: self.cache.get_seq_length()]
            self.last = Completion(self.llm.decode(answer), answer, request.stats)

    def _stream_turn(
        self, ids: list[int], asked: list[dict[str, str]], on_progress: OnProgress | None, sampling: dict[str, Any]
    ) -> Iterator[str]:
        """Answer, and remember the turn once there is an answer, if only its first token."""
        self.last = None
        try:
            yield from self.stream_answer(ids, on_progress=on_progress, **sampling)
        finally:
            last: Completion | None = self.last
            if last is not None and last.token_ids:
                self.messages = [*asked, {"role": "assistant", "content": last.text}]

    def save(self, directory: str | Path) -> None:
        """Write the conversation with its keys, values and indexes to a new folder; see `LLM.restore`."""
        self._mend()
        save_session(Path(directory), self.state(), self.cache, self.llm.model)

    def _begin(self, ids: list[int], on_progress: OnProgress | None, sampling: dict[str, Any]) -> Request:
        """Check what is asked, drop what the cache holds beyond the common prefix, and make the request."""
        self._mend()
        request = self.llm.request(self.cache, on_progress, sampling)
        self.llm.encode(ids)
        self.llm.plan(len(ids) + request.sampling.max_new_tokens).check(already=self._bytes_held())
        keep = min(_common_prefix(ids, self._cached), len(ids) - 1)
        if keep < len(self._cached):
            self._go_back(keep)
        request.cache = self.cache
        return request

    def _bytes_held(self) -> int:
        indexes = (memory.far_index.if_built for memory in self.cache.memories)
        stored = sum(memory.store.nbytes for memory in self.cache.memories) + self.cache.marked_bytes
        return stored + sum(index.nbytes for index in indexes if index is not None)

    def _mend(self) -> None:
        """After an interruption, wherever it struck: all layers hold the same tokens, and they are the ones we name."""
        self.cache.settle()
        if self.cache.spoiled:
            log.warning("the last turn was interrupted where this model cannot go back; prefilling anew")
            self.cache, self._cached = self.llm.new_cache(), []
        self._cached = self._cached[: self.cache.get_seq_length()]

    def _go_back(self, keep: int) -> None:
        """Drop all but the first `keep` of what the cache holds, or more if a layer cannot go back to just these."""
        reached = self.cache.reachable(keep) or keep
        try:
            self.cache.crop(reached - len(self._cached))
        except ValueError as reason:
            log.warning("prefilling anew: %s", reason)
            self.cache, reached = self.llm.new_cache(), 0
        self._cached = self._cached[:reached]

    def _with_user_text(self, text: str) -> list[dict[str, str]]:
        """The messages, with a text added to the user's open turn or as a new one."""
        if not self._turn_open:
            return [*self.messages, {"role": "user", "content": text}]
        return [*self.messages[:-1], {"role": "user", "content": self.messages[-1]["content"] + _BETWEEN + text}]

    def _extended(self, text: str) -> list[int]:
        """The conversation's ids followed by those of a text; a stop token that already stands there is not doubled."""
        new = self.llm.encode_text(text) if self.token_ids or self._has_template else self.llm.encode(text)
        if self.token_ids and new and new[0] == self.token_ids[-1] and new[0] in self.llm.stop_ids():
            new = new[1:]
        return self.token_ids + new

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.llm.tokenizer, "chat_template", None))

    def _around_turn(self) -> Around:
        """What comes before and after the user's next text: the template's, or a blank line within an open turn."""
        if not self._has_template:
            return Around(_BETWEEN if self._turn_open else "", "")
        around = turn_frame(self.llm, self.system, first=self._turn_open or not self.token_ids)
        return around._replace(before=_BETWEEN) if self._turn_open else around


class _Detokeniser:
    """Turns tokens into text that never shows half a character."""

    # Decoding starts over from a few tokens back, so that a long answer costs no more per token than a short one.
    _CONTEXT, _MOST = 8, 64

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        # A replacement character at the end is a character whose bytes have not all come.
        return "" if text.endswith("\ufffd") else self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        if len(self._ids) > self._MOST:
            self._ids = self._ids[-self._CONTEXT :]
            self._shown = self._decode(self._ids)
        return piece


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
