"""One sequence in one layer: its host store, its window, the sample of its queries, and the index over what is far."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.build import BuiltIndex, QuerySample, build_far_index
from retrieval_attn.choose import Choice, choose_index
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.host import Array
from retrieval_attn.index import Index
from retrieval_attn.kernels import TailSummary
from retrieval_attn.offload import HostStore
from retrieval_attn.window import Split, Window, split

log = logging.getLogger("retrieval_attn")


class LayerShape(NamedTuple):
    """What a layer's memory looks like: KV heads, dimensions of a key and of a value, dtype, tokens reserved for; and
    how many layers there are like it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    capacity: int
    n_layers: int = 1


class LayerMemory:
    """Every token of one sequence in one layer, each either near or far, never both.

    The host store holds all tokens in order; the window holds copies of the near ones on the device; the index covers
    the far ones and follows the boundary as tokens leave the window. Not safe for two threads, except that a background
    build may run while tokens are appended.
    """

    def __init__(self, config: RetrievalConfig, shape: LayerShape) -> None:
        self.config = config
        self.shape = shape
        self.store = HostStore(*shape[:5])
        self.window = Window(config.n_sink, config.n_local)
        self.sample = QuerySample(config.build_queries)
        self.scale = shape.key_dim**-0.5
        self.build_seconds = 0.0
        self.build_fraction = 0.0
        self.index_reason = ""
        self.steps = 0
        # What the last step found, where the next one begins, and how many keys it took; forgotten on crop.
        self.last_ids: Array | None = None
        self.reach: int | None = None
        # Chunks of the prompt for which no head is asked what it could leave out, and how many the next time.
        self.rest, self.next_rest = 0, 1
        self._index: Index | None = None
        self._tail: TailSummary | None = None
        self._built_on = 0
        self._building: Future[BuiltIndex] | None = None

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

    def outgrown(self) -> bool:
        """Whether the index was built for another kind of context: far shorter, or too short for its kind."""
        if self._index is None or self._building is not None:
            return False
        if self.split.n_far > 2 * self._built_on:
            return True
        wanted, kind = self.choice().kind, self._index.kind
        # Left to choose, a kind once built stays: the memory it takes must not talk us out of it.
        return wanted != kind and (self.config.index != "auto" or kind == "exact" or wanted == "graph")

    def choice(self) -> Choice:
        """The kind of index that suits the far keys of this moment."""
        shape = self.shape
        return choose_index(
            self.config, self.split.n_far, shape.n_layers, shape.kv_heads, shape.key_dim, steps=self.steps
        )

    def build_later(self, submit: Callable[..., "Future[BuiltIndex]"], cancelled: Callable[[], bool]) -> None:
        """Hand the build to another thread; the first search waits for it, and its failure surfaces there.

        Keys and queries are those of this moment: what the caller adds meanwhile is appended to the index later.
        """
        self.build_fraction = 0.0
        self._building = submit(build_far_index, *self._build_input(), cancelled, self._note_progress)

    @property
    def building(self) -> "Future[BuiltIndex] | None":
        """The build that the next search will wait for, if there is one."""
        return self._building

    def forget_build(self) -> None:
        """Give up a build that has not finished; the next search starts anew."""
        if self._building is not None and not (self._building.done() and self._building.exception() is None):
            self._building.cancel()
            self._building = None

    def drop_failed_build(self) -> None:
        """Let go of a build that failed, with a word in the log; the next search starts anew."""
        building = self._building
        if building is not None and building.done() and (building.cancelled() or building.exception() is not None):
            self._building = None
            if not building.cancelled():
                log.warning("an index build failed and will be repeated: %s", building.exception())

    def index(self) -> Index:
        """The index over exactly the far keys: built, waited for, or brought up to date as needed."""
        if self._building is not None:
            self._take_build(self._building)
        if self._index is None:
            self._adopt(build_far_index(*self._build_input()))
        assert self._index is not None
        self._follow_boundary(self._index)
        return self._index

    def tail(self) -> TailSummary:
        """The summary of exactly the far keys and values; call `index` first."""
        if self._tail is None:
            self._tail = TailSummary(self.far_keys(), self.far_values())
        return self._tail

    def crop(self, length: int) -> None:
        """Forget every token from `length` on, in store, window, sample and index; also what an interrupted `append`
        left in some of them. May be repeated: interrupted, it leaves nothing that a second call does not mend.
        """
        if max(self.length, self.window.length, self.sample.length) <= length:
            return
        if self._building is not None:
            try:
                self._take_build(self._building)
            except Exception as error:
                log.warning("an index build failed and will be repeated: %s", error)
        self.forget_step()
        self.rest, self.next_rest = 0, 1
        # First what can be brought up to date from the store, should this be interrupted; the store after it.
        self._crop_index(split(length, self.config.n_sink, self.config.n_local).n_far)
        self.window.crop(length, self.store.keys(), self.store.values())
        self.store.crop(length)
        self.sample.crop(length)

    def _crop_index(self, n_far: int) -> None:
        tail, self._tail = self._tail, None
        if tail is not None and n_far:
            tail.truncate(n_far, self.far_keys(), self.far_values())
            self._tail = tail
        # Cut by more than half, an index no longer suits its keys: the next search builds a new one.
        if self._index is not None and 2 * n_far < self._index.n_keys:
            self._index = None
        if self._index is not None and n_far < self._index.n_keys:
            self._index.truncate(n_far)

    def forget_step(self) -> None:
        """Let the next step begin as if there had been none before it."""
        self.last_ids, self.reach = None, None

    def _build_input(self) -> tuple[RetrievalConfig, Choice, Tensor, Tensor, Tensor, float]:
        return self.config, self.choice(), self.far_keys(), self.far_values(), self.sample.queries(), self.scale

    def _note_progress(self, fraction: float) -> None:
        self.build_fraction = fraction

    def _take_build(self, building: "Future[BuiltIndex]") -> None:
        try:
            built = building.result()
        except Exception:
            # A failed build is reported once, and begun anew; an interrupted wait must not lose the build.
            self._building = None
            raise
        self._building = None
        self._adopt(built)

    def _adopt(self, built: BuiltIndex) -> None:
        self._index, self._built_on, self.build_seconds = built.index, built.index.n_keys, built.seconds
        self._tail, self.index_reason = built.tail, built.reason

    def copy(self) -> "LayerMemory":
        """An independent memory with the same tokens; it builds its own index."""
        store = self.store
        twin = LayerMemory(self.config, self.shape)
        twin.store.append(store.keys(), store.values())
        twin.window = self.window.copy()
        twin.sample, twin.scale = self.sample.copy(), self.scale
        return twin

    def refill(self, keys: Tensor, values: Tensor, sample: dict[str, Tensor], device: torch.device) -> None:
        """Fill an empty memory with stored tokens: keys (G, n, D), values (G, n, Dv), and `QuerySample.state`."""
        self.store.append(keys, values)
        self.window.append(keys[None].to(device), values[None].to(device))
        self.sample.restore(sample)

    def adopt_index(self, index: Index, tail: TailSummary | None = None) -> None:
        """Use an index that was built over these far keys, and the summary that went with it."""
        self._index, self._built_on, self._tail = index, index.n_keys, tail
        self.index_reason = "restored"

    @property
    def index_if_built(self) -> Index | None:
        """The index, if there is one already; never waits."""
        return self._index

    def _follow_boundary(self, index: Index) -> None:
        indexed = index.n_keys
        far = self.far_keys()
        if indexed < far.shape[1]:
            index.append(far[:, indexed:], keys=far)
        if self._tail is not None and self._tail.length < far.shape[1]:
            # Interrupted half-way, a summary is of no use: it is then made anew.
            tail, self._tail = self._tail, None
            tail.append(far[:, tail.length :], self.far_values()[:, tail.length :])
            self._tail = tail
