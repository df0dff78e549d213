"""transformers' cache with our layers in the place of its full-attention ones, and the threads that index them."""

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from retrieval_attn.attention.decode import StepClock
from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.attention.pattern_files import load_patterns
from retrieval_attn.attention.prefill_policy import PrefillCounts, PrefillPolicy
from retrieval_attn.config import PREFILLS, RetrievalConfig
from retrieval_attn.hf.hybrid_layer import HybridLayer
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.hf.layers import attends_to_all, widest_text
from retrieval_attn.hf.marks import Mark, copied, kept_of, marked
from retrieval_attn.hf.positions import made_for
from retrieval_attn.hf.rope import rope_border
from retrieval_attn.hf.served import refuse_unserved
from retrieval_attn.hf.versions import LinearAttentionAndFullAttentionLayer
from retrieval_attn.kernels import HeadPattern
from retrieval_attn.threads import budget, jobs
from retrieval_attn.threads.jobs import Job, Worker
from retrieval_attn.threads.pool import require_safe_threads, set_threads

# Tokens for which address space is reserved at least: so far, nothing is ever copied as a context grows.
DEFAULT_CAPACITY = 1 << 20

# What a fork with options of its own shares with what it was forked from.
KEPT_BY_FORKS = ("kv_dtype", "kv_dir", "build_queries", "prefill")


class RetrievalCache(DynamicCache):
    """A transformers cache whose full-attention layers keep their tokens in CPU memory and retrieve.

    Sliding-window and linear layers stay stock. Use it with a model loaded with `attn_implementation="retrieval"`
    (after `retrieval_attn.register()`), one cache per conversation:

        cache = RetrievalCache(model.config, RetrievalConfig(top_k=100))
        model.generate(ids, cache=cache)  # past_key_values=cache before transformers 5.24

    Several tokens at once attend exactly, or as `config.prefill` says; a single token retrieves, or is exact, too,
    inside `exact()`; inside `retrieving()` several retrieve, too. Not for use from two threads at once.

    Raises ValueError for models whose attention cannot be served, by name.
    """

    def __init__(
        self,
        model_config: Any,
        config: RetrievalConfig | None = None,
        patterns: Sequence[Sequence[HeadPattern]] | None = None,
    ) -> None:
        """patterns: what `prefill_patterns` gave for this model and config; None reads the file, if there is one."""
        config = config or RetrievalConfig()
        refuse_unserved(model_config)
        patterns = prefill_patterns(model_config, config) if patterns is None else patterns
        super().__init__(config=model_config)
        # More than a model was made for costs nothing until it is used, and its context may have been stretched.
        capacity = max(made_for(model_config) or 0, config.max_tokens or 0, DEFAULT_CAPACITY)
        ours = [attends_to_all(layer, model_config) for layer in self.layers]
        # Of layers that are ours although they have one, because no text was to fill it.
        self._window = widest_text(self.layers, model_config)
        given = patterns if patterns is not None else [()] * len(ours)
        self.layers: list[Any] = [
            _ours_for(layer, config, capacity, sum(ours), PrefillPolicy(config, own)) if mine else layer
            for layer, mine, own in zip(self.layers, ours, given, strict=True)
        ]
        self.config = config
        require_safe_threads()
        self.spoiled = False
        self._marks: tuple[Mark, ...] = ()
        self._moving = False
        # Of the text that the tokens are a part of, if who feeds them says so.
        self.text_length = 0
        self._border = rope_border(model_config)
        self._own_threads()

    def _own_threads(self) -> None:
        """Let builds and appends run in threads that end with this cache."""
        self._builder, appender = Worker("retrieval-build"), Worker("retrieval-append")
        this = weakref.ref(self)
        for layer in self.retrieval_layers:
            layer.before_decode = lambda: _start_builds(this)
            layer.submit = functools.partial(appender.submit, _with_one_thread)
            for memory in layer.memories:
                memory.far_index.submit = layer.submit

    def fork(self, config: RetrievalConfig | None = None) -> "RetrievalCache":
        """An independent cache with the same tokens; what neither changes is held once, copy-on-write.

        config: other options for the fork, so that one prompt, read once, is gone on with in different ways; its
        indexes are then built anew. How tokens are stored and sampled must stay as it is: `kv_dtype`, `kv_dir`,
        `build_queries` and the pattern of `prefill`. Waits for index builds that are under way. Both may go on, each
        in a thread of its own.

        Raises ValueError naming the option that cannot be another.
        """
        for name in KEPT_BY_FORKS if config is not None else ():
            if getattr(config, name) != (now := getattr(self.config, name)):
                raise ValueError(f"a fork must keep {name}={now!r}, got {getattr(config, name)!r}")
        twin = copy.copy(self)
        twin.config = config or self.config
        twin.layers = [
            layer.fork(config) if isinstance(layer, RetrievalLayer) else copied(layer) for layer in self.layers
        ]
        twin._own_threads()
        return twin

    @property
    def retrieval_layers(self) -> list[RetrievalLayer]:
        """The layers that are ours, in order."""
        return [layer for layer in self.layers if isinstance(layer, RetrievalLayer)]

    @property
    def memories(self) -> list[LayerMemory]:
        """Every memory of every layer, in order of layers."""
        return [memory for layer in self.retrieval_layers for memory in layer.memories]

    def exact(self) -> AbstractContextManager[None]:
        """Inside, every forward pass attends exactly, single tokens included: prefill of any chunk size."""
        return self._in_phase("prefill")

    def retrieving(self) -> AbstractContextManager[None]:
        """Inside, every forward pass retrieves, several tokens at once included."""
        return self._in_phase("retrieve")

    @contextmanager
    def _in_phase(self, phase: str) -> Iterator[None]:
        for layer in self.retrieval_layers:
            layer.phase = phase
        try:
            yield
        finally:
            for layer in self.retrieval_layers:
                layer.phase = "auto"

    def start_builds(self) -> list[Job]:
        """Build the indexes that are missing or outgrown in a background thread, first layer first.

        Returns the builds now under way. A step that needs an index waits for it.
        """
        submit = functools.partial(self._builder.submit, _beside_requests, self.config.threads)
        for memory in self.memories:
            if memory.wants_build() or memory.outgrown():
                memory.far_index.build_later(submit, memory.far(), memory.build_inputs())
        return [memory.far_index.building for memory in self.memories if memory.far_index.building is not None]

    def working(self) -> AbstractContextManager[None]:
        """Inside, the calling thread uses `config.threads`, or half of them while indexes are built beside it."""
        return budget.request(self.config.threads)

    def cancel_builds(self) -> None:
        """Stop builds under way and those not begun; a later step starts them anew."""
        self._builder.cancel()
        for memory in self.memories:
            memory.far_index.forget_build()

    def crop(self, tokens: int) -> None:
        """Drop the last `-tokens` tokens of every layer, or of none if a layer cannot.

        A positive number is the length to keep, as transformers before 5.20 passes it. Raises ValueError when a
        recurrent layer would have to go back, or a sliding-window layer has already let go of what it would need again,
        unless there is a `mark` at that length; and for more tokens than there are.
        """
        n_held = self.get_seq_length()
        if -tokens > n_held:
            raise ValueError(f"cannot drop {-tokens} tokens, the cache holds {n_held}")
        self._crop_to(min(tokens, n_held) if tokens > 0 else n_held + tokens)

    def settle(self) -> None:
        """After a forward pass, interrupted or not: bring all layers to the tokens that every layer holds.

        Recurrent layers count no tokens. That one has changed in a pass that broke before any other layer did is known
        of passes through `load` only; with code of one's own, make a new cache then.

        Never raises. If a layer cannot go back there, all go to the last `mark` before; if there is none, the cache is
        `spoiled`, and refuses further use.
        """
        try:
            self._crop_to(self.reachable(min(self._lengths())))
        except ValueError:
            self.spoiled = True

    def mark(self, passing: bool = False) -> None:
        """Remember what sliding-window and recurrent layers hold now, so that `crop` can come back to this length.

        Costs nothing for a model without such layers. Few marks are kept (see `marks.kept_of`), in CPU memory; those of
        tokens that are dropped go with them. A passing mark is kept until the next one is made.
        """
        n_tokens, others = self.get_seq_length(), self._others()
        if others and n_tokens and not self._marked_at(n_tokens):
            lasting = [mark for mark in self._marks if not mark.passing]
            self._marks = kept_of([*lasting, marked(n_tokens, others, passing)])

    @property
    def wants_marks(self) -> bool:
        """Whether there are layers that cannot go back wherever they are asked to."""
        return bool(self._others())

    @property
    def marked_bytes(self) -> int:
        """Bytes of all marks, in CPU memory; forks share those of what they share."""
        return sum(mark.nbytes for mark in self._marks)

    def reachable(self, n_tokens: int) -> int:
        """Of the first `n_tokens`, as many as the cache can go back to: all, those of the last mark before, or none."""
        if self._first_stuck(n_tokens) is None:
            return n_tokens
        return max((mark.n_tokens for mark in self._marks if mark.n_tokens <= n_tokens), default=0)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, layers change one after the other; what is interrupted here, `settle` takes back."""
        self._moving = True
        yield
        # Not where an error leaves: recurrent layers, which count no tokens, do not tell whether they have changed.
        self._moving = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers; raises ValueError if an interrupted pass has left the layers uneven for good, and for more
        tokens than a layer attends to."""
        if self.spoiled:
            raise ValueError("an interrupted forward pass left this cache uneven; start a new cache and prefill")
        held = self.layers[layer_idx].get_seq_length() if self._border or self._window else 0
        if self._window and held + key_states.shape[-2] > self._window:
            raise ValueError(f"this model attends to the last {self._window} tokens only; shorten the text to as many")
        if self._crosses(held, held, max(held + key_states.shape[-2], self.text_length)):
            raise ValueError(
                f"keys are turned otherwise in a text of more than {self._border} tokens, which begins with this pass, "
                f"and {held} tokens are in the cache; give a new cache the whole text in one pass, or use "
                "retrieval_attn.load"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.text_length, self._marks = 0, ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row i from what was row beam_idx[i]; marks, which are of the rows before, are forgotten."""
        self._marks = ()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; marks are forgotten."""
        self._marks = ()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows; marks are forgotten."""
        self._marks = ()
        super().batch_select_indices(indices)

    def _crosses(self, n_tokens: int, held: int, wanted: int) -> bool:
        """Whether of the tokens held, `n_tokens` would be turned otherwise as part of a text of `wanted`."""
        if self._border is None or n_tokens == 0:
            return False
        return (max(held, self.text_length) > self._border) != (wanted > self._border)

    def forget_unless_turned_for(self, n_tokens: int) -> bool:
        """Forget everything if a text of `n_tokens` turns otherwise what is here; returns whether it was so.

        Only models with the rope type "longrope" ever do: where a text outgrows the length that they were first made
        for, all of its keys change.
        """
        held = self.get_seq_length()
        if crosses := self._crosses(held, held, n_tokens):
            self.cancel_builds()
            self.reset()
        return crosses

    def _lengths(self) -> list[int]:
        """Tokens of every layer that counts them; recurrent layers do not."""
        return [layer.get_seq_length() for layer in self.layers if hasattr(layer, "get_seq_length")]

    def _others(self) -> dict[int, Any]:
        """Stock layers that hold something and may be unable to go back, by their numbers; parts of ours, too."""
        stock = {i: _stock_part(layer) for i, layer in enumerate(self.layers)}
        return {i: x for i, x in stock.items() if hasattr(x, "get_seq_length") or hasattr(x, "conv_states")}

    def _marked_at(self, n_tokens: int) -> Mark | None:
        return next((mark for mark in self._marks if mark.n_tokens == n_tokens), None)

    def _first_stuck(self, keep: int) -> int | None:
        """The first layer that cannot go back to `keep` tokens by itself, if there is one."""
        nothing_goes = keep >= max(self._lengths()) and not self._moving
        stuck = (i for i, layer in self._others().items() if not _can_crop(layer, keep, nothing_goes))
        return next(stuck, None)

    def _crop_to(self, keep: int) -> None:
        held = max(self._lengths())
        if keep < held and self._crosses(keep, held, keep):
            raise ValueError(
                f"keys are turned otherwise in a text of at most {self._border} tokens than in the longer one that "
                f"they are from, so the cache cannot go back to {keep}; start a new cache and prefill"
            )
        stuck, mark = self._first_stuck(keep), self._marked_at(keep)
        if stuck is not None and mark is None:
            raise ValueError(
                f"layer {stuck} ({type(self.layers[stuck]).__name__}) cannot go back to {keep} tokens; start a new "
                "cache and prefill"
            )
        with self.moving():
            # First: what is interrupted here has a mark to go back to, or stays as it is.
            self._marks = tuple(mark for mark in self._marks if mark.n_tokens <= keep)
            for layer in self.retrieval_layers:
                layer.keep(keep)
            if stuck is not None and mark is not None:
                self._put_back(mark)
            else:
                _crop_stock(self._others().values(), keep)
        if keep == 0:
            self.text_length = 0

    def _put_back(self, mark: Mark) -> None:
        for i, layer in mark.layers.items():
            if isinstance(ours := self.layers[i], HybridLayer):
                ours.recurrent = copied(layer)
            else:
                self.layers[i] = copied(layer)

    def reset_clocks(self) -> None:
        """Start the measurement of steps and of prefill anew."""
        for layer in self.retrieval_layers:
            layer.clock = StepClock()
            layer.prefilled = PrefillCounts()


def _ours_for(stock: Any, *args: Any) -> RetrievalLayer:
    """The layer in the place of a stock one, which may have a recurrence beside its attention."""
    if isinstance(stock, LinearAttentionAndFullAttentionLayer):
        return HybridLayer(stock.number_of_states, *args)
    return RetrievalLayer(*args)


def _stock_part(layer: Any) -> Any:
    """What of a layer is transformers' own: all, nothing, or its recurrence."""
    if isinstance(layer, HybridLayer):
        return layer.recurrent
    return None if isinstance(layer, RetrievalLayer) else layer


def _with_one_thread(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    set_threads(1)
    return work(*args, **options)


def _beside_requests(threads: int | None, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Build an index with the threads that requests leave, until it is cancelled."""
    with budget.build(threads) as adjust:
        # Asked between blocks of work, in the building thread.
        return work(*args, cancelled=lambda: adjust() or jobs.is_cancelled(), **options)


def _start_builds(cache: "weakref.ref[RetrievalCache]") -> None:
    alive = cache()
    if alive is not None:
        alive.start_builds()


def _crop_stock(layers: Iterable[Any], keep: int) -> None:
    """Bring layers that can go back to `keep` tokens there."""
    for layer in layers:
        if not hasattr(layer, "get_seq_length"):
            continue
        # Recording layers drop what they recorded on every crop, so they are told even when nothing goes; others are
        # not, because before 5.14 a stock layer takes crop(0) for "drop everything".
        extra = layer.get_seq_length() - keep
        if extra > 0 or getattr(layer, "record_past", False):
            layer.crop(-max(0, extra))


def _can_crop(layer: Any, keep: int, nothing_goes: bool) -> bool:
    """Whether a stock layer can go back to `keep` tokens; sliding ones forget what left their window, and recurrent
    ones, which count no tokens, cannot go back at all."""
    if not hasattr(layer, "get_seq_length"):
        return nothing_goes
    if not layer.is_initialized or layer.get_seq_length() <= keep:
        return True
    if getattr(layer, "is_sliding", False):
        return layer.get_seq_length() < layer.sliding_window or getattr(layer, "record_past", False)
    return bool(getattr(layer, "is_croppable", isinstance(layer, DynamicLayer)))


def prefill_patterns(model_config: Any, config: RetrievalConfig) -> Sequence[Sequence[HeadPattern]] | None:
    """The patterns of each layer of the model, if the config names a file of them; errors as of `load_patterns`."""
    if config.prefill in PREFILLS:
        return None
    text = model_config.get_text_config(decoder=True)
    return load_patterns(config.prefill, text.num_hidden_layers, text.num_attention_heads)
