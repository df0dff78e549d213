"""The two seams to transformers: a registered attention function, and a cache whose full-attention layers are ours.

Nothing is patched. `RetrievalLayer.update` returns only the new keys and values and hangs itself on the key tensor; the
attention function, which runs next, finds it there. This is the one file that knows transformers' cache and attention
contracts.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from retrieval_attn import cores, jobs
from retrieval_attn.compat import (
    ALL_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
    query_length,
    sdpa_mask,
)
from retrieval_attn.config import PREFILLS, RetrievalConfig
from retrieval_attn.decode import StepClock, decode, decode_block
from retrieval_attn.far_index import Submit
from retrieval_attn.host import require_safe_threads, set_threads
from retrieval_attn.jobs import Job, Worker
from retrieval_attn.kernels import AttentionState, HeadPattern
from retrieval_attn.memory import LayerMemory, LayerShape
from retrieval_attn.patterns import load_patterns
from retrieval_attn.prefill import PrefillPolicy, prefill

NAME = "retrieval"

# Tokens for which address space is reserved at least: so far, nothing is ever copied as a context grows.
DEFAULT_CAPACITY = 1 << 20


def register() -> None:
    """Make `attn_implementation="retrieval"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def unregister() -> None:
    """Undo `register`."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), new key and value (B, G, T, D); returns (B, T, H, D).

    Sliding-window layers go to stock sdpa. Raises ValueError where silence would be wrong output: a full-attention
    layer whose cache is not a `RetrievalCache`, keys shared between layers, softcapped logits, learned sinks, masks.
    """
    layer = getattr(key, "_ra_layer", None)
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            "learned attention sinks (gpt-oss) take a share that no key stands for; they are not supported"
        )
    if layer is None:
        if not _is_sliding(module, kwargs):
            raise ValueError(
                f"attention 'retrieval' in layer {getattr(module, 'layer_idx', '?')} needs the cache "
                "retrieval_attn.RetrievalCache(model.config, config), got another cache or none; pass it as "
                "past_key_values=, or load the model with attn_implementation='sdpa'"
            )
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("softcapped attention logits (Gemma-2) are not inner products and cannot be retrieved")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state = layer.attend(query.detach(), key.detach(), value.detach(), attention_mask, scale)
    return state.out.transpose(1, 2).contiguous(), None


def make_mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """transformers' mask interface: stock masks for sliding layers, else the (B, S) padding mask or None.

    A T x S mask is never made. Without this function registered, left padding would be ignored silently.
    """
    if local_size is not None:
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError("only causal attention with padding is supported; the model asks for a mask of its own on top")
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask


def _is_sliding(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("sliding_window") is not None:
        return True
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return kinds is not None and index is not None and kinds[index] in ("sliding_attention", "chunked_attention")


@contextmanager
def watched_attention(model: Any, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, the full-attention layers of a model call `function`; at the end all is as it was, whatever happened.

    function: as transformers' attention interface, see `attend`; with all keys and values of the cache in use, or of
    this pass if there is none, and with stock masks: None where causality says it all. Sliding-window layers go to
    stock sdpa. Not for a model that another thread uses meanwhile.
    """

    def watched(module: torch.nn.Module, *inputs: Any, **kwargs: Any) -> tuple[Tensor, None]:
        chosen = ALL_ATTENTION_FUNCTIONS["sdpa"] if _is_sliding(module, kwargs) else function
        return chosen(module, *inputs, **kwargs)

    name, before = f"watched-{id(model):x}", model.config._attn_implementation
    AttentionInterface.register(name, watched)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        try:
            model.set_attn_implementation(before)
        finally:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)


class RetrievalLayer(DynamicLayer):
    """A full-attention cache layer whose tokens live in `LayerMemory`, one per sequence of the batch."""

    def __init__(
        self, config: RetrievalConfig, capacity: int, n_layers: int = 1, policy: PrefillPolicy | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.policy = policy or PrefillPolicy(config)
        self.n_layers = n_layers
        self.memories: list[LayerMemory] = []
        self.clock = StepClock()
        self.phase = "auto"
        self.before_decode: Callable[[], None] = lambda: None
        self.submit: Submit | None = None
        self._capacity = capacity
        self._seen = 0  # tokens per row, padding included, as transformers counts them
        self._padding: Tensor | None = None  # (B, seen) bool, True = token; None while no row has padding
        self._awaiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """One memory per sequence."""
        values = key_states if value_states is None else value_states
        B, G, _, D = key_states.shape
        shape = LayerShape(G, D, values.shape[3], key_states.dtype, self._capacity, self.n_layers, B)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.memories = [LayerMemory(self.config, shape) for _ in range(B)]
        for memory in self.memories:
            memory.far_index.submit = self.submit
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values, the keys with a handle on this layer; they are stored by `attend`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._awaiting:
            raise ValueError(
                "the keys of the last forward pass were never attended to: the model must be loaded with "
                "attn_implementation='retrieval' (after an interrupted pass, call settle() on the cache first)"
            )
        if key_states.shape[0] != len(self.memories):
            raise ValueError(f"the cache holds a batch of {len(self.memories)}, got a batch of {key_states.shape[0]}")
        self._awaiting = True
        key_states = key_states.view_as(key_states)
        key_states._ra_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> AttentionState:
        """Store the new tokens and attend: exactly for several tokens, through the index for a single one."""
        if not self._awaiting:
            raise ValueError("two layers share one layer's keys and values (as in Gemma-3n), which is not supported")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"only (batch, tokens) padding masks are supported, got a mask of shape {list(mask.shape)}"
            )
        self._awaiting = False
        valid = self._note_padding(mask, len(self.memories), keys.shape[2])
        if valid is None and len(self.memories) == 1:
            state = self._attend_one(self.memories[0], query, keys, values, scale)
        else:
            state = self._attend_rows(query, keys, values, valid, scale)
        self._seen += keys.shape[2]
        return state

    def _attend_one(
        self, memory: LayerMemory, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> AttentionState:
        memory.scale = scale
        single = query.shape[2] == 1
        if self.phase == "prefill" or (self.phase == "auto" and not single) or memory.length == 0:
            memory.forget_step()
            return prefill(query, keys, values, memory, scale, self.policy)
        if self.phase == "retrieve":
            memory.forget_step()
        if single:
            memory.append(query, keys, values)
        if memory.wants_build():
            self.before_decode()
        if single:
            return decode(query, memory, scale, self.clock)
        return decode_block(query, keys, values, memory, scale, self.clock)

    def _attend_rows(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scale: float
    ) -> AttentionState:
        """Sequence by sequence, padding left out; rows of padding give the empty state."""
        n_batch, n_heads, n_new = query.shape[:3]
        out = query.new_zeros((n_batch, n_heads, n_new, values.shape[3]))
        lse = torch.full((n_batch, n_heads, n_new), -torch.inf, device=query.device)
        for b, memory in enumerate(self.memories):
            rows = torch.arange(n_new, device=query.device) if valid is None else valid[b].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            parts = [x[b : b + 1].index_select(2, rows) for x in (query, keys, values)]
            state = self._attend_one(memory, parts[0], parts[1], parts[2], scale)
            out[b].index_copy_(1, rows, state.out[0])
            lse[b].index_copy_(1, rows, state.lse[0])
        return AttentionState(out, lse)

    def _note_padding(self, mask: Tensor | None, n_batch: int, n_new: int) -> Tensor | None:
        """Remember which of the new tokens are padding; None if none of all tokens is."""
        if mask is None and self._padding is None:
            return None
        new = torch.ones((n_batch, n_new), dtype=torch.bool) if mask is None else mask[:, -n_new:].bool()
        if self._padding is None:
            self._padding = torch.ones((n_batch, self._seen), dtype=torch.bool, device=new.device)
        self._padding = torch.cat([self._padding, new.to(self._padding.device)], dim=1)
        return new

    def get_seq_length(self) -> int:
        """Tokens per row, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length_or_positions: Any) -> tuple[int, int]:
        """Length and offset of the mask that transformers should describe."""
        return self._seen + query_length(query_length_or_positions), 0

    def crop(self, tokens: int) -> None:
        """Drop the last `-tokens` tokens; a positive number is the length to keep (transformers before 5.20)."""
        keep = min(self._seen, tokens if tokens > 0 else self._seen + tokens)
        if keep < 0:
            raise ValueError(f"cannot drop {-tokens} tokens, the cache holds {self._seen}")
        self.keep(keep)

    def keep(self, n_tokens: int) -> None:
        """Go back to the first `n_tokens` of each row, whatever an interrupted pass left behind; may be repeated."""
        # First what `settle` goes by: interrupted after this, it asks for the same again.
        self._seen, self._awaiting = n_tokens, False
        if self._padding is not None:
            self._padding = self._padding[:, :n_tokens]
        for b, memory in enumerate(self.memories):
            memory.crop(n_tokens if self._padding is None else int(self._padding[b].sum()))

    def reset(self) -> None:
        """Forget everything."""
        self.memories, self._seen, self._padding, self._awaiting = [], 0, None, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row i from what was row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.memories)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows; a row named twice is forked."""
        chosen = indices.tolist() if indices.dtype != torch.bool else indices.nonzero()[:, 0].tolist()
        first_use = {old: new for new, old in reversed(list(enumerate(chosen)))}
        self.memories = [
            self.memories[old] if first_use[old] == new else self.memories[old].fork() for new, old in enumerate(chosen)
        ]
        for memory in self.memories:
            memory.shape = memory.shape._replace(n_sequences=len(chosen))
        if self._padding is not None:
            self._padding = self._padding[chosen]

    def fork(self, config: RetrievalConfig | None = None) -> "RetrievalLayer":
        """An independent layer with the same tokens; what neither changes is held once. config: its own options."""
        twin = copy.copy(self)
        twin.config = config or self.config
        twin.memories = [memory.fork(config) for memory in self.memories]
        twin.policy, twin.clock = PrefillPolicy(twin.config, self.policy.patterns), StepClock()
        return twin

    def offload(self) -> None:
        """Nothing to do: tokens are in CPU memory already."""

    def prefetch(self) -> None:
        """Nothing to do: only what is retrieved goes to the device."""


# What a fork with options of its own shares with what it was forked from.
KEPT_BY_FORKS = ("kv_dtype", "kv_dir", "build_queries", "prefill")


class RetrievalCache(DynamicCache):
    """A transformers cache whose full-attention layers keep their tokens in CPU memory and retrieve.

    Sliding-window and linear layers stay stock. Use it with a model loaded with `attn_implementation="retrieval"`
    (after `retrieval_attn.register()`), one cache per conversation:

        cache = RetrievalCache(model.config, RetrievalConfig(top_k=100))
        model.generate(ids, past_key_values=cache)

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
        capacity = max(_max_positions(model_config) or 0, DEFAULT_CAPACITY)
        # Exact type: subclasses are other kinds of layer.
        ours = [type(layer) is DynamicLayer for layer in self.layers]
        given = patterns if patterns is not None else [()] * len(ours)
        self.layers: list[Any] = [
            RetrievalLayer(config, capacity, sum(ours), PrefillPolicy(config, own)) if mine else layer
            for layer, mine, own in zip(self.layers, ours, given, strict=True)
        ]
        self.config = config
        if not self.retrieval_layers:
            raise ValueError(
                f"{_model_type(model_config)!r} has no full-attention layer, so there is nothing to retrieve"
            )
        require_safe_threads()
        self.spoiled = False
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
            layer.fork(config) if isinstance(layer, RetrievalLayer) else copy.deepcopy(layer) for layer in self.layers
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
                memory.far_index.build_later(submit, memory.far(), memory.recipe())
        return [memory.far_index.building for memory in self.memories if memory.far_index.building is not None]

    def working(self) -> AbstractContextManager[None]:
        """Inside, the calling thread uses `config.threads`, or half of them while indexes are built beside it."""
        return cores.request(self.config.threads)

    def cancel_builds(self) -> None:
        """Stop builds under way and those not begun; a later step starts them anew."""
        self._builder.cancel()
        for memory in self.memories:
            memory.far_index.forget_build()

    def crop(self, tokens: int) -> None:
        """Drop the last `-tokens` tokens of every layer, or of none if a layer cannot.

        A positive number is the length to keep, as transformers before 5.20 passes it. Raises ValueError when a
        sliding-window layer has already let go of what it would need again, and for more tokens than there are.
        """
        n_held = self.get_seq_length()
        if -tokens > n_held:
            raise ValueError(f"cannot drop {-tokens} tokens, the cache holds {n_held}")
        self._crop_to(min(tokens, n_held) if tokens > 0 else n_held + tokens)

    def settle(self) -> None:
        """After a forward pass, interrupted or not: bring all layers to the tokens that every layer holds.

        Never raises. If a sliding-window layer has let go of what it would need, the cache is `spoiled`, and refuses
        further use.
        """
        try:
            self._crop_to(min(self._lengths()))
        except ValueError:
            self.spoiled = True

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers; raises ValueError if an interrupted pass has left the layers uneven for good."""
        if self.spoiled:
            raise ValueError("an interrupted forward pass left this cache uneven; start a new cache and prefill")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _lengths(self) -> list[int]:
        """Tokens of every layer that counts them; recurrent layers do not."""
        return [layer.get_seq_length() for layer in self.layers if hasattr(layer, "get_seq_length")]

    def _crop_to(self, keep: int) -> None:
        nothing_goes = keep >= max(self._lengths())
        for i, layer in enumerate(self.layers):
            if not _can_crop(layer, keep, nothing_goes):
                raise ValueError(
                    f"layer {i} ({type(layer).__name__}) cannot go back to {keep} tokens; start a new cache and prefill"
                )
        for layer in self.layers:
            if isinstance(layer, RetrievalLayer):
                layer.keep(keep)
                continue
            if not hasattr(layer, "get_seq_length"):
                continue
            # Recording layers drop what they recorded on every crop, so they are told even when nothing goes; others
            # are not, because before 5.14 a stock layer takes crop(0) for "drop everything".
            extra = layer.get_seq_length() - keep
            if extra > 0 or getattr(layer, "record_past", False):
                layer.crop(-max(0, extra))

    def reset_clocks(self) -> None:
        """Start the measurement of steps and of prefill anew."""
        for layer in self.retrieval_layers:
            layer.clock = StepClock()
            layer.policy.reset()


def _with_one_thread(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    set_threads(1)
    return work(*args, **options)


def _beside_requests(threads: int | None, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Build an index with the threads that requests leave, until it is cancelled."""
    with cores.build(threads) as adjust:
        # Asked between blocks of work, in the building thread.
        return work(*args, cancelled=lambda: adjust() or jobs.is_cancelled(), **options)


def _start_builds(cache: "weakref.ref[RetrievalCache]") -> None:
    alive = cache()
    if alive is not None:
        alive.start_builds()


def _can_crop(layer: Any, keep: int, nothing_goes: bool) -> bool:
    """Whether a layer can go back to `keep` tokens; stock sliding layers forget what left their window, and recurrent
    layers, which count no tokens, cannot go back at all."""
    if isinstance(layer, RetrievalLayer):
        return True
    if not hasattr(layer, "get_seq_length"):
        return nothing_goes
    if not layer.is_initialized or layer.get_seq_length() <= keep:
        return True
    if getattr(layer, "is_sliding", False):
        return layer.get_seq_length() < layer.sliding_window or getattr(layer, "record_past", False)
    return bool(getattr(layer, "is_croppable", isinstance(layer, DynamicLayer)))


def refuse_unserved(model_config: Any) -> None:
    """Raise ValueError, with the model's name and the reason, if its attention cannot be served."""
    name = _model_type(model_config)
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{name!r} is an encoder-decoder; only decoder-only causal language models are served")
    text = model_config.get_text_config(decoder=True)
    if getattr(text, "model_type", "") in _ENCODERS and not getattr(text, "is_decoder", False):
        raise ValueError(f"{name!r} attends in both directions; only causal language models are served")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ValueError(f"{name!r} uses multi-head latent attention (MLA), whose cache holds no keys to retrieve")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name!r} softcaps its attention logits, which are then not inner products to search by")
    if getattr(text, "model_type", "") == "gpt_oss":
        raise ValueError(f"{name!r} has learned attention sinks, which are not supported")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError(f"{name!r} shares keys and values between layers, which is not supported")
    if getattr(text, "num_attention_heads", None) is None or getattr(text, "model_type", "") in _NO_ATTENTION:
        raise ValueError(f"{name!r} has no attention layers, so there is nothing to retrieve")


# Listed by transformers among the causal models, but they attend both ways unless made decoders. Known by name, because
# before 5.0 every config says is_decoder=False.
_ENCODERS = {"bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"}
_ENCODERS |= {"roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"}

_NO_ATTENTION = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}


def _model_type(model_config: Any) -> str:
    return str(getattr(model_config, "model_type", type(model_config).__name__))


def prefill_patterns(model_config: Any, config: RetrievalConfig) -> Sequence[Sequence[HeadPattern]] | None:
    """The patterns of each layer of the model, if the config names a file of them; errors as of `load_patterns`."""
    if config.prefill in PREFILLS:
        return None
    text = model_config.get_text_config(decoder=True)
    return load_patterns(config.prefill, text.num_hidden_layers, text.num_attention_heads)


def _max_positions(model_config: Any) -> int | None:
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
