"""One sequence in one layer: its host store, its window, the sample of its queries, and the index over what is far."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.arrays import Array
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.far_index import BuildInputs, Far, FarIndex, n_covered
from retrieval_attn.far.index_choice import IndexChoice, choose_index
from retrieval_attn.far.query_sample import QuerySample
from retrieval_attn.index import Index
from retrieval_attn.kernels import TailSummary
from retrieval_attn.kv.device_prefix import DevicePrefix
from retrieval_attn.kv.host_store import Extent, HostStore
from retrieval_attn.kv.window import Split, Window, split


class MemoryShape(NamedTuple):
    """What a layer's memory looks like: KV heads, dimensions of a key and of a value, dtype, tokens reserved for; how
    many layers there are like it, and how many sequences share the memory that the config grants."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    capacity: int
    n_layers: int = 1
    n_sequences: int = 1


# Chunks for which a layer that had no sparse head is not asked again, at most.
LONGEST_REST = 8


class Rest(NamedTuple):
    """Chunks of the prompt for which no head is asked what it could leave out, and how many the next time.

    Asking costs up to a fifth of dense attention, and a layer that has no use for it mostly stays so.
    """

    chunks: int = 0
    next_chunks: int = 1

    @property
    def is_over(self) -> bool:
        # Saved sessions may hold a number below 0.
        return self.chunks <= 0

    def shorter(self) -> "Rest":
        """What is left after a chunk that nobody was asked about."""
        return self._replace(chunks=self.chunks - 1)

    def after(self, all_dense: bool) -> "Rest":
        """The rest that follows a chunk whose heads were asked."""
        if not all_dense:
            return Rest(0, 1)
        return Rest(self.next_chunks, min(LONGEST_REST, 2 * self.next_chunks))


class LayerMemory:
    """Every token of one sequence in one layer, each either near or far, never both.

    The host store holds all tokens in order; the window holds copies of the near ones on the device; the index covers
    the far ones and follows the boundary as tokens leave the window. Not safe for two threads, except that builds and
    appends of the index run in the background.
    """

    def __init__(self, config: RetrievalConfig, shape: MemoryShape, store: HostStore | None = None) -> None:
        """store: its tokens, if it has some; else an empty one is made."""
        self.config = config
        self.shape = shape
        folder = None if config.kv_dir is None else Path(config.kv_dir).expanduser()
        self.store = store or HostStore(*shape[:5], int8=config.kv_dtype == "int8", folder=folder)
        self.window = Window(config.n_sink, config.n_local)
        self.device_prefix = DevicePrefix(0)
        self.sample = QuerySample(config.build_queries)
        self._follow_with(FarIndex(config))
        self.scale = shape.key_dim**-0.5
        self.steps = 0
        # What the last step found, where the next one begins, and how many keys it took; forgotten on crop.
        self.last_ids: Array | None = None
        self.reach: int | None = None
        self.rest = Rest()

    def _follow_with(self, far_index: FarIndex) -> None:
        """Let this be the index over the far keys; the store tells it when they become others."""
        self.far_index = far_index
        self.store.before_rewrite = far_index.drop

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.store.length

    @property
    def split(self) -> Split:
        """Which tokens are near and which are far, now."""
        return split(self.length, self.config.n_sink, self.config.n_local)

    def append(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add n tokens: query (1, H, n, D), keys (1, G, n, D), values (1, G, n, Dv).

        Raises MemoryError beyond what the config allows, OSError if the disk of `kv_dir` is full.
        """
        self._require_room(self.length + keys.shape[2])
        self.sample.add(query)
        self.store.append(keys[0], values[0])
        self.window.append(keys, values)

    def _require_room(self, length: int) -> None:
        """Raise MemoryError if so many tokens are more than the config's hard limits allow."""
        config, shape = self.config, self.shape
        if config.max_tokens is not None and length > config.max_tokens:
            raise MemoryError(f"the context has reached max_tokens={config.max_tokens}; raise it, or shorten the text")
        if config.max_host_bytes is None:
            return
        most = config.max_host_bytes // (self.store.bytes_per_token * shape.n_layers * shape.n_sequences)
        if length > most:
            raise MemoryError(
                f"{most} tokens fill max_host_bytes={config.max_host_bytes}; raise it, use kv_dtype='int8', or "
                "shorten the text"
            )

    def far(self) -> Far:
        """The far tokens as stored; row i is token `split.sink_stop + i`."""
        start, stop, _ = self.split
        return Far(self.store.keys(start, stop), self.store.values(start, stop))

    def far_keys(self) -> Tensor:
        """(G, n_far, D), in CPU memory."""
        return self.far().keys

    def wants_build(self) -> bool:
        """Whether there are far tokens that an index should cover, and there is none, nor a build under way."""
        far_index = self.far_index
        return far_index.if_built is None and far_index.building is None and n_covered(self.split.n_far) > 0

    def outgrown(self) -> bool:
        """Whether the index was built for another kind of context: far shorter, or too short for its kind."""
        index = self.far_index.if_built
        if index is None or self.far_index.building is not None:
            return False
        if self.split.n_far > 2 * self.far_index.built_on:
            return True
        wanted, kind = self.choice().kind, index.kind
        # Left to choose, a kind once built stays: the memory it takes must not talk us out of it.
        return wanted != kind and (self.config.index != "auto" or kind == "exact" or wanted == "graph")

    def choice(self) -> IndexChoice:
        """The kind of index that suits the far keys of this moment."""
        shape = self.shape
        return choose_index(
            self.config, self.split.n_far, shape.n_layers, shape.kv_heads, shape.key_dim, steps=self.steps
        )

    def build_inputs(self) -> BuildInputs:
        """What an index of this moment is built from, besides the far tokens."""
        return BuildInputs(self.choice(), self.store.folded(self.sample.queries()), self.scale)

    def index(self) -> Index | None:
        """What a step searches, a snapshot over the first far keys; those after its `n_keys` are read exactly.

        None while there are too few for an index. Built, waited for, or brought up to date as needed.
        """
        return self.far_index.for_step(self.far(), self.build_inputs)

    def tail(self) -> TailSummary:
        """The summary of exactly the far keys and values that the last search covered."""
        return self.far_index.tail(self.far())

    def crop(self, length: int) -> None:
        """Forget every token from `length` on, in store, window, sample and index; also what an interrupted `append`
        left in some of them. May be repeated: interrupted, it leaves nothing that a second call does not mend.
        """
        if max(self.length, self.window.length, self.sample.length) <= length:
            return
        self.far_index.settle(self.far())
        self.forget_step()
        self.rest = Rest()
        # First what can be brought up to date from the store, should this be interrupted; the store after it.
        after = split(min(length, self.length), self.config.n_sink, self.config.n_local)
        span = after.sink_stop, after.far_stop
        self.far_index.truncate(Far(self.store.keys(*span), self.store.values(*span)))
        self.window.crop(length, self.store.read)
        self.device_prefix.crop(length)
        self.store.crop(length)
        self.sample.crop(length)

    def forget_step(self) -> None:
        """Let the next step begin as if there had been none before it."""
        self.last_ids, self.reach = None, None

    def fork(self, config: RetrievalConfig | None = None) -> "LayerMemory":
        """An independent memory with the same tokens and index; what neither changes is held once.

        config: other options for it; its window is then filled and its index built anew. Waits for a build that is
        under way.
        """
        twin = LayerMemory(config or self.config, self.shape, self.store.fork())
        twin.sample, twin.scale = self.sample.copy(), self.scale
        twin.far_index.submit = self.far_index.submit
        if twin.config != self.config:
            if self.length:
                twin.window.refill(self.length, self.window.device, twin.store.read)
            return twin
        twin.window = self.window.copy()
        twin._follow_with(self.far_index.fork(self.far(), twin.far()))
        for name in ("steps", "last_ids", "reach", "rest"):
            setattr(twin, name, getattr(self, name))
        return twin

    def state(self) -> dict[str, Tensor]:
        """What `adopt` needs besides keys and values, as tensors."""
        counts = torch.tensor([self.far_index.built_on, self.steps, *self.rest])
        return self.window.state() | self.sample.state() | self.store.scales() | {"memory_counts": counts}

    def adopt_index(self, index: Index, state: dict[str, Tensor]) -> None:
        """Use the index that was saved with this memory, and with it the summary in `state`, if there is one."""
        tail = TailSummary.restore(state) if "tail_means" in state else None
        # It is built anew when it would have been.
        self.far_index.adopt(index, tail, "restored", built_on=int(state["memory_counts"][0]))

    def adopt(
        self, keys: Extent, values: Extent, n_tokens: int, state: dict[str, Tensor], device: torch.device
    ) -> None:
        """Become, empty so far, a memory of tokens that a file holds as stored; what the file holds is not read yet.

        state: of the memory that was saved. Raises MemoryError beyond what the config allows.
        """
        self._require_room(n_tokens)
        self.store.adopt(keys, values, n_tokens, state)
        self.window.restore(n_tokens, state, device)
        self.sample.restore(state)
        _, self.steps, *rest = state["memory_counts"].tolist()
        self.rest = Rest(*rest)
