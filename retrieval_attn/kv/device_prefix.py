"""Keeps the first tokens of a layer on the device, too, so that prefill need not bring them back from the host."""

from collections.abc import Iterator

from torch import Tensor


class DevicePrefix:
    """Keys and values of the first tokens of one sequence in one layer, kept on the device up to a given number."""

    def __init__(self, most: int) -> None:
        self.length = 0
        self._most = most
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Keep what fits of tokens `start`, ...; keys (1, G, n, D), values (1, G, n, Dv). Gaps are not kept."""
        n = min(keys.shape[2], self._most - self.length)
        if start != self.length or n <= 0:
            return
        self._keys = self._with_room(self._keys, keys, start + n)
        self._values = self._with_room(self._values, values, start + n)
        self._keys[:, :, start : start + n] = keys[:, :, :n]
        self._values[:, :, start : start + n] = values[:, :, :n]
        self.length = start + n

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)

    def tiles(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of at most `size` tokens each."""
        assert self._keys is not None or not self.length
        for start in range(0, self.length, size):
            span = slice(start, min(self.length, start + size))
            yield self._keys[:, :, span], self._values[:, :, span]  # type: ignore[index]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(x.nbytes for x in (self._keys, self._values) if x is not None)

    def _with_room(self, held: Tensor | None, like: Tensor, length: int) -> Tensor:
        if held is not None and held.shape[2] >= length:
            return held
        capacity = min(self._most, max(length, 2 * (0 if held is None else held.shape[2])))
        roomy = like.new_empty((1, like.shape[1], capacity, like.shape[3]))
        if held is not None:
            roomy[:, :, : self.length] = held[:, :, : self.length]
        return roomy
