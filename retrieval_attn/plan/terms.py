"""How many bytes each part of a long context takes, from the sizes of the model alone.

Every function is one term of the plan (plan.py) and says where its numbers come from. All are for one sequence.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_build import needs_tail
from retrieval_attn.far.index_choice import bytes_per_key
from retrieval_attn.far.query_sample import RECENT_QUERIES
from retrieval_attn.hf.layers import attends_to_all, stock_layers
from retrieval_attn.hf.marks import MOST_MARKS
from retrieval_attn.index.graph.cells import MAX_CELL
from retrieval_attn.index.graph.links import N_CANDIDATES, N_COMPARED
from retrieval_attn.index.scan.map import SAMPLE
from retrieval_attn.kernels.tail import MOST_PAGES

FLOAT32 = 4

# A token id in Python: a number of 32 bytes, and a place of 8 in each of the four lists that a session keeps.
TOKEN_ID = 64

# What the tokenizer takes per token while it reads: a string, offsets and flags, and two places for every character.
# Measured alone, on prose of 4.5 characters a token: 743 bytes at 58K tokens, 724 at 231K.
TOKENIZING = 725

# What CUDA itself takes on a device before the first tensor: an assumption, 0.3 to 0.6 GiB by driver and card.
CUDA_CONTEXT = 2**29

# Leaves whose means `index/graph/links.py` takes at once.
LEAVES_AT_ONCE = 1 << 15

# Freed memory that glibc keeps: in the heap of the main thread up to its trim threshold (at most twice the largest
# block that it does not map by itself, 32 MiB), and in that of another thread up to the size of one such heap.
HEAP_KEEPS = 64 << 20

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide about memory.

    n_layers: those with full attention. sliding: tokens that all sliding-window layers together keep. G: KV heads, D:
    numbers of a key, and of a value. hidden, mlp: numbers per token between layers, and inside a feed-forward layer.
    itemsize: bytes of a number of the model. recurrent: bytes of the states of all recurrent layers.
    """

    n_layers: int
    sliding: int
    H: int
    G: int
    D: int
    hidden: int
    mlp: int
    vocabulary: int
    itemsize: int
    recurrent: int = 0

    @classmethod
    def of(cls, model_config: Any, dtype: torch.dtype) -> "ModelShape":
        """From a transformers config."""
        layers = stock_layers(model_config)
        ours = [attends_to_all(layer, model_config) for layer in layers]
        text = _of_layer(model_config.get_text_config(decoder=True), ours.index(True) if any(ours) else 0)
        H = text.num_attention_heads
        return cls(
            n_layers=sum(ours),
            sliding=sum(
                getattr(layer, "sliding_window", None) or 0
                for layer, mine in zip(layers, ours, strict=True)
                if not mine
            ),
            H=H,
            G=getattr(text, "num_key_value_heads", None) or H,
            D=getattr(text, "head_dim", None) or text.hidden_size // H,
            hidden=text.hidden_size,
            mlp=_mlp_width(text),
            vocabulary=text.vocab_size,
            itemsize=dtype.itemsize,
            recurrent=sum(hasattr(layer, "conv_states") for layer in layers) * _recurrent_state(text, dtype.itemsize),
        )

    @property
    def row(self) -> int:
        """Bytes of one token's keys and values in one layer, in the model's dtype."""
        return 2 * self.G * self.D * self.itemsize


def _of_layer(text: Any, i: int) -> Any:
    """The config of layer i, where transformers keeps one for each; some models' (Gemma 4) heads differ by layer."""
    return text.per_layer_config[i] if hasattr(text, "per_layer_config") else text


def _mlp_width(text: Any) -> int:
    """Numbers per token inside a feed-forward layer; of a mixture, in the experts that a token goes to."""
    dense = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    each = getattr(text, "moe_intermediate_size", None) or 0
    # Some have experts of their own for images, of another width; which comes first is the width of those for text.
    expert = each[0] if isinstance(each, list | tuple) else each
    return max(dense, expert * (getattr(text, "num_experts_per_tok", None) or 0))


def _recurrent_state(text: Any, itemsize: int) -> int:
    """Bytes of one recurrent layer: a float32 state, and the last inputs of a convolution.

    Gated delta rule (Qwen3-Next): a matrix of key by value dimensions per head. Mamba: some numbers per channel. LFM2:
    only the inputs.
    """
    if heads := getattr(text, "linear_num_value_heads", None):
        keys, values = text.linear_key_head_dim, heads * text.linear_value_head_dim
        channels, state = 2 * text.linear_num_key_heads * keys + values, keys * values
    elif per_channel := _first(text, "mamba_d_state", "ssm_state_size"):
        heads = _first(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
        width = _first(text, "mamba_d_head", "mamba_head_dim", "mamba_headdim")
        inner = heads * width if heads and width else (_first(text, "mamba_expand", "expand") or 2) * text.hidden_size
        groups = _first(text, "mamba_n_groups", "mamba_ngroups", "n_groups") or 0
        channels, state = inner + 2 * groups * per_channel, inner * per_channel
    else:
        channels, state = text.hidden_size, 0
    kernel = _first(text, "linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv_L_cache") or 4
    return kernel * channels * itemsize + state * FLOAT32


def _first(text: Any, *names: str) -> int | None:
    """What a config says under the first of these names that it knows."""
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def stored_kv(shape: ModelShape, n_tokens: int, config: RetrievalConfig) -> int:
    """Keys and values of all tokens in host memory: layers x KV heads x (key + value) x bytes of a number."""
    return shape.n_layers * shape.row // shape.itemsize * kv_itemsize(shape, config) * n_tokens


def kv_itemsize(shape: ModelShape, config: RetrievalConfig) -> int:
    """Bytes of a stored number: the model's own, or 1."""
    return 1 if config.kv_dtype == "int8" else shape.itemsize


def unused_pages(shape: ModelShape) -> int:
    """Memory is handed out in whole pages, huge ones if the system has them, to each head's keys and values.

    They begin and end anywhere within one: half a page at both ends, on average.
    """
    return 2 * shape.n_layers * shape.G * page_size()


def page_size() -> int:
    """Bytes of the pages that a store's memory comes in; it asks for huge ones."""
    try:
        if "[never]" not in (_HUGE_PAGES / "enabled").read_text():
            return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except OSError:
        pass  # no such thing here
    return mmap.PAGESIZE


def near_window(shape: ModelShape, config: RetrievalConfig) -> int:
    """Copies of the near tokens on the model's device, and what sliding-window and recurrent layers keep there."""
    return shape.row * shape.n_layers * (config.n_sink + config.n_local) + _others(shape)


def marks(shape: ModelShape) -> int:
    """What a session keeps, at most, of what sliding-window and recurrent layers held where it may go back to."""
    return MOST_MARKS * _others(shape)


def _others(shape: ModelShape) -> int:
    return shape.row * shape.sliding + shape.recurrent


def query_sample(shape: ModelShape, config: RetrievalConfig) -> int:
    """Queries of all heads that are kept to teach the indexes: twice `build_queries` rows, and the recent ones."""
    return shape.n_layers * _n_sampled(config) * shape.H * shape.D * shape.itemsize


def _n_sampled(config: RetrievalConfig) -> int:
    return 2 * config.build_queries + RECENT_QUERIES


def index(shape: ModelShape, kind: str, n_far: int, config: RetrievalConfig) -> int:
    """The indexes of all layers; for "scan" at most, because how short its codes may be depends on the keys."""
    bonus = FLOAT32 if config.estimator == "lift" else 0
    return shape.n_layers * shape.G * n_far * (bytes_per_key(kind, shape.D) + bonus)


def tail_summary(shape: ModelShape, n_far: int, config: RetrievalConfig) -> int:
    """Mean keys and values of pages, with as much room again to grow, and a covariance per head; float32."""
    if n_far == 0 or not needs_tail(config):
        return 0
    n_pages = min(2 * MOST_PAGES, 2 * (n_far // MOST_PAGES + 1))
    return shape.n_layers * shape.G * (n_pages + shape.D) * 2 * shape.D * FLOAT32


def build_scratch(shape: ModelShape, kind: str, n_far: int, config: RetrievalConfig) -> int:
    """What building takes beside the index itself: one layer at a time, and one head of it at a time.

    The layer's sampled queries are brought together, and made float32 by way of as many integers. Then, of one head:
    graph: see `_graph_scratch`.
    ivf: the head before, and its keys on their way to float32 by way of integers.
    scan: 16K keys of every head and two copies of one head's, in float64.
    page: the summaries in float32, 2 D numbers per 16 keys, twice and a half while they are rounded.
    """
    queries = _n_sampled(config) * shape.H * shape.D * (shape.itemsize + 2 * FLOAT32)
    head = n_far * shape.D * FLOAT32
    scratch = {
        "exact": 0,
        "graph": _graph_scratch(n_far, shape.D),
        "ivf": 3 * head,
        "scan": (shape.G + 2) * min(n_far, SAMPLE) * shape.D * 2 * FLOAT32,
        "page": 5 * head // 16,
    }
    return queries + scratch[kind]


def _graph_scratch(n_far: int, dim: int) -> int:
    """The more of two steps, beside which stand the keys of a head and their points in the queries' metric, float32.

    Growing the tree: both once more in the tree's order, twice what group means are taken off, and the means of leaves,
    one per two keys. Linking: the candidates of every key, the scores of the largest cell, and the means of 32K leaves
    in four steps.
    """
    head = n_far * dim * FLOAT32
    grow = 4 * head + head // 2
    means = 4 * min(LEAVES_AT_ONCE, n_far // 2) * dim * FLOAT32
    link = (n_far * N_CANDIDATES + min(n_far, MAX_CELL) * min(n_far, N_COMPARED)) * FLOAT32 + means
    return 2 * head + max(grow, link)


def kept_by_heap(freed: int) -> int:
    """Of memory that was taken in many pieces and freed, what the C library keeps for later, at most."""
    return min(freed, HEAP_KEEPS)


def activations(shape: ModelShape, n_new: int) -> int:
    """What a forward pass of n_new tokens holds at once, at the widest place of a layer.

    Two rows of `hidden` per token throughout, the stream and what was added to it; beside them either the feed-forward
    layer (gate, up, and their product), or attention (queries, keys and values before and after they are turned; two
    states in float32 and their merger), or a norm (two copies in float32).
    """
    mlp = 3 * shape.mlp * shape.itemsize
    turned = 2 * (shape.H + 2 * shape.G) * shape.D * shape.itemsize
    attention = turned + 3 * shape.H * shape.D * FLOAT32
    norm = 2 * shape.hidden * FLOAT32
    return n_new * (2 * shape.hidden * shape.itemsize + max(mlp, attention, norm))


def logits(shape: ModelShape) -> int:
    """One row of logits, and its float32 copy that a token is chosen from."""
    return shape.vocabulary * (shape.itemsize + FLOAT32)


def tiles(shape: ModelShape, n_tokens: int, config: RetrievalConfig) -> int:
    """Two tiles of one layer's keys and values: one is attended to while the other arrives.

    Sparse prefill brings whole heads instead, as many as there is room for, and one in any case.
    """
    two = 2 * min(n_tokens, config.prefill_tile) * shape.row
    one_head = 0 if config.prefill == "dense" else n_tokens * shape.row // shape.G
    return max(two, one_head)


def decoded_tile(shape: ModelShape, n_tokens: int, config: RetrievalConfig) -> int:
    """Keys and values that are stored as int8 are read a tile at a time: in the model's dtype, by way of float32."""
    if config.kv_dtype != "int8":
        return 0
    return min(n_tokens, config.prefill_tile) * (shape.row + shape.G * shape.D * FLOAT32)


def one_layer(shape: ModelShape, total: int) -> int:
    """The share of one layer: sessions are saved, and an index that grows is copied, layer by layer."""
    return total // max(1, shape.n_layers)
