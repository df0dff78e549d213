"""Tokens as text, piece by piece, as they come."""

from collections.abc import Callable, Sequence

# What a tokenizer writes for bytes that are no character, or none yet.
_BROKEN = "\ufffd"

# Tokens that are decoded again and again: a few before what is new, since a tokenizer may write a word otherwise where
# a text begins. Cut off when they are many, so that a long answer costs no more per token than a short one.
_CONTEXT, _MOST = 8, 64


class Detokeniser:
    """Turns tokens into text that never shows half a character.

    decode: the text of token ids.
    text: all pieces, joined.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.text = ""
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""  # of the text of `_ids`
        self._borders: list[int] = []  # how many of them end with a whole character

    def add(self, token: int) -> str:
        """Take in a token; returns what there is to show, which may be nothing."""
        self._ids.append(token)
        decoded = self._decode(self._ids)
        return "" if decoded.endswith(_BROKEN) else self._show(decoded)

    def flush(self) -> str:
        """What was held back, though it is no character."""
        return self._show(self._decode(self._ids))

    def _show(self, decoded: str) -> str:
        piece, self._shown = decoded[len(self._shown) :], decoded
        self._borders.append(len(self._ids))
        self.text += piece
        if len(self._ids) > _MOST:
            self._forget()
        return piece

    def _forget(self) -> None:
        """Drop the oldest tokens, up to the end of a character: what begins within one is written otherwise."""
        first = max((border for border in self._borders if border <= len(self._ids) - _CONTEXT), default=0)
        self._ids = self._ids[first:]
        self._borders = [border - first for border in self._borders if border > first]
        self._shown = self._decode(self._ids)


def text_of(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> str:
    """An answer's text as its pieces make it up, for one that was not streamed."""
    whole = Detokeniser(decode)
    for token in token_ids:
        whole.add(token)
    whole.flush()
    return whole.text
