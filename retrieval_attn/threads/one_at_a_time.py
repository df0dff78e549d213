"""What is for one call at a time, and says so instead of waiting."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager


class _Holder:
    """Lives as long as somebody holds the turn."""


class OneAtATime:
    """A turn that is taken and given back; a second taker, in whichever thread, is refused.

    An interruption cannot leave it taken: it is held by an object, which goes with the call that made it.
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self._guard = threading.Lock()
        self._held_by: weakref.ref[_Holder] | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the turn is the caller's. Raises RuntimeError with the refusal if it is not free."""
        holder = _Holder()
        with self._guard:
            if self._held_by is not None and self._held_by() is not None:
                raise RuntimeError(self._refusal)
            self._held_by = weakref.ref(holder)
        try:
            yield
        finally:
            self._held_by = None
