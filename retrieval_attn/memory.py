"""One sequence in one layer: its host store, its window, the sample of its queries, and the index over what is far."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.build import QuerySample, build_far_index
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.index import Index
from retrieval_attn.offload import HostStore
from retrieval_attn.window import Split, Window, split


class LayerShape(NamedTuple):
    """What a layer's memory looks like: KV heads, dimensions of a key and of a value, dtype, tokens reserved for."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    capacity: int


class LayerMemory:
    """Every token of one sequence in one layer, each either near or far, never both.

    The host store holds all tokens in order; the window holds copies of the near ones on the device; the index covers
    the far ones and follows the boundary as tokens leave the window. Not safe for two threads, except that a background
    build may run while tokens are appended.
    """

    def __init__(self, config: RetrievalConfig, shape: LayerShape) -> None:
        self.config = config
        self.shape = shape
        self.store = HostStore(*shape)
        self.window = Window(config.n_sink, config.n_local)
        self.sample = QuerySample(config.build_queries)
        self.build_seconds = 0.0
        self._index: Index | None = None
        self._building: Future[Index] | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.store.length

    @property
    def split(self) -> Split:
        """Which tokens are near and which are far, now."""
        return split(self.length, self.config.n_sink, self.config.n_local)

    def append(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add n tokens: query (1, H, n, D), keys (1, G, n, D), values (1, G, n, Dv)."""
        self.sample.add(query)
        self.store.append(keys[0], values[0])
        self.window.append(keys, values)

    def far_keys(self) -> Tensor:
        """(G, n_far, D), in CPU memory; row i is token `split.sink_stop + i`."""
        return self.store.keys(self.split.sink_stop, self.split.far_stop)

    def far_values(self) -> Tensor:
        """(G, n_far, Dv), in CPU memory."""
        return self.store.values(self.split.sink_stop, self.split.far_stop)

    def wants_build(self) -> bool:
        """Whether there are far tokens that no index covers and no build is under way for."""
        return self._index is None and self._building is None and self.split.n_far > 0

    def build(self, cancelled: Callable[[], bool] | None = None) -> Index:
        """Build the index over the far keys of this moment; the caller decides in which thread."""
        built = build_far_index(self.config, self.far_keys(), self.sample.queries(), cancelled)
        self.build_seconds = built.seconds
        return built.index

    def build_later(self, building: "Future[Index]") -> None:
        """Let the first search wait for a build that runs elsewhere; its failure surfaces there."""
        self._building = building

    @property
    def building(self) -> "Future[Index] | None":
        """The build that the next search will wait for, if there is one."""
        return self._building

    def forget_build(self) -> None:
        """Give up a build that has not finished; the next search starts anew."""
        if self._building is not None and not (self._building.done() and self._building.exception() is None):
            self._building.cancel()
            self._building = None

    def index(self) -> Index:
        """The index over exactly the far keys: built, waited for, or brought up to date as needed."""
        if self._building is not None:
            # Cleared only once the result is in: an interrupted wait must not lose the build.
            self._index = self._building.result()
            self._building = None
        if self._index is None:
            self._index = self.build()
        self._follow_boundary(self._index)
        return self._index

    def crop(self, length: int) -> None:
        """Forget every token from `length` on, in store, window, sample and index."""
        if length >= self.length:
            return
        self.window.crop(length, self.store.keys(), self.store.values())
        self.store.crop(length)
        self.sample.crop(length)
        if self._building is not None:
            self._index, self._building = self._building.result(), None
        if self._index is None:
            return
        # Cut by more than half, an index no longer suits its keys: the next search builds a new one.
        if 2 * self.split.n_far < self._index.n_keys:
            self._index = None
        elif self.split.n_far < self._index.n_keys:
            self._index.truncate(self.split.n_far)

    def copy(self) -> "LayerMemory":
        """An independent memory with the same tokens; it builds its own index."""
        store = self.store
        twin = LayerMemory(self.config, self.shape)
        twin.store.append(store.keys(), store.values())
        twin.window = self.window.copy()
        twin.sample = self.sample.copy()
        return twin

    def refill(self, keys: Tensor, values: Tensor, sample: dict[str, Tensor], device: torch.device) -> None:
        """Fill an empty memory with stored tokens: keys (G, n, D), values (G, n, Dv), and `QuerySample.state`."""
        self.store.append(keys, values)
        self.window.append(keys[None].to(device), values[None].to(device))
        self.sample.restore(sample)

    def adopt_index(self, index: Index) -> None:
        """Use an index that was built over these far keys."""
        self._index = index

    @property
    def index_if_built(self) -> Index | None:
        """The index, if there is one already; never waits."""
        return self._index

    def _follow_boundary(self, index: Index) -> None:
        indexed = index.n_keys
        far = self.far_keys()
        if indexed < far.shape[1]:
            index.append(far[:, indexed:], keys=far)
