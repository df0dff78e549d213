"""What a conversation is besides its keys, values and indexes, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SessionState:
    """A conversation at one moment; a session gives it and goes on from it.

    messages: role and content of every turn. token_ids: of the whole conversation, as generated and never encoded
    again. cached_ids: those whose keys the cache holds; not always the first of token_ids, for a turn may have been
    interrupted in its prefill. answer_start: where in token_ids the last answer begins; None before the first.
    turn_open: whether a text was read and its question is still to come.
    """

    system: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    token_ids: tuple[int, ...] = ()
    cached_ids: tuple[int, ...] = ()
    answer_start: int | None = None
    turn_open: bool = False
