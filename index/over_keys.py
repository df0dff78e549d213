"""What all kinds of index do alike: they stand on keys, and one thread at a time replaces what searches read."""

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, Self, TypeVar

from retrieval_attn.index.keys import Keys
from retrieval_attn.index.lift import Lift
from retrieval_attn.index.protocol import check_truncate


class OnKeys(Protocol):
    """A state that stands on keys."""

    @property
    def keys(self) -> Keys: ...


State = TypeVar("State", bound=OnKeys)


class OverKeys(ABC, Generic[State]):
    """An index whose state is replaced as a whole and never changed, so that a search that holds an old one goes on.

    A kind adds `build`, `search`, `save` and `restore`, and says what else changes when its keys do.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._state.keys.shape

    @property
    def n_keys(self) -> int:
        return self.shape[1]

    @property
    def lift(self) -> Lift | None:
        return self._state.keys.lift

    def append(self, new_keys: Any, *, keys: Any = None) -> None:
        """See `Index.append`."""
        with self._lock:
            self._grow(self._state.keys.grown(new_keys, keys))

    def truncate(self, n_keys: int) -> None:
        """See `Index.truncate`."""
        with self._lock:
            check_truncate(n_keys, self.n_keys)
            self._shrink(self._state.keys.first(n_keys))

    def fork(self, keys: Any = None) -> Self:
        """See `Index.fork`."""
        state = self._state
        return self._forked(state, state.keys.moved(keys))

    def snapshot(self) -> Self:
        """See `Index.snapshot`."""
        return self.fork()

    @abstractmethod
    def _grow(self, keys: Keys) -> None:
        """Take `keys`, the old ones and more, into the state; under the lock."""

    @abstractmethod
    def _shrink(self, keys: Keys) -> None:
        """Take `keys`, the first of the old ones, into the state; under the lock."""

    @abstractmethod
    def _forked(self, state: State, keys: Keys) -> Self:
        """Another index of this state over `keys`, the same ones."""
