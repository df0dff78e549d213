"""All options: those of the runtime and those of drawing tokens, in two frozen dataclasses that check their fields.

The command line has its help from their docstrings: an entry `name: text` per field, whose first sentence must stand by
itself. A sentence that begins with "None:" says what None means.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

# Units, for who reads a signature and for who writes an option: 8k tokens, 24g bytes.
Tokens = Annotated[int, "tokens"]
Bytes = Annotated[int, "bytes"]

INDEX_KINDS = ("exact", "ivf", "graph", "scan", "page", "auto")

ESTIMATORS = ("topk", "lift", "tail")

KV_DTYPES = ("auto", "int8")

FOLLOWUPS = ("exact", "retrieve")

# Fewer new tokens than this attend exactly: they cost little, and a question is worth it.
FEWEST_SPARSE = 512

# Tokens from which on prefill="auto" looks for what to leave out. On a CPU, layers that have something ran at 0.96 and
# 1.10 times the speed of dense attention at 16K, and at 1.39 and 1.45 times at 32K; a layer that has nothing lost up to
# 28 % (bench/results/kernels-real*-mass95-2core.json). It has not been measured on GPUs.
DENSE_BELOW = 16384

PREFILLS = ("auto", "dense", "a_shape", "vertical_slash", "block_sparse")

# Of a model rather than of retrieval, see `load`.
DTYPES = ("auto", "float32", "bfloat16", "float16")

WEIGHTS = ("auto", "bf16", "int8", "int4")


@dataclass(frozen=True)
class RetrievalConfig:
    """How far keys are found, and what stays near.

    index: this index finds the far keys. "auto" chooses by length, memory and use, and says why in the stats; "graph"
        looks at a few per cent of the keys and is the paper's method; "scan" looks at all of them through a fraction of
        their bytes, and needs no building; "page" opens the most promising runs of consecutive keys; "exact" scans all
        keys (the oracle, and the honest baseline); "ivf" is faiss's inverted file, the usual baseline.
    top_k: each query head retrieves this many far keys. The paper's 100 is the default; hard key-value lookups want up
        to 2000, and as many as there are far keys give full attention.
    n_sink: this many of the first tokens stay near. The paper's 128 hold the attention sink.
    n_local: this many of the last tokens stay near. The paper has 512. At least 1: the newest token is always near.
    effort: the index searches this hard. It is the beam width of "graph" and the number of lists that "ivf" probes.
        None: the index chooses by `top_k`.
    estimator: the estimator says what the retrieved keys stand for. "tail" adds the estimated contribution of the keys
        that were not retrieved, from page means and a covariance (kernels/tail.py): at 100 keys read, the error of the
        output was 0.38 of that of "topk" on synthetic vectors, 0.24, 0.47 and 0.8 on the layers of the embedded model.
        "lift" retrieves a weighted sample instead of the best keys, unbiased on average (SoftmaxLift). "topk"
        renormalises over the best keys, as in the paper.
    mass: retrieval recovers this share of the attention mass, such as 0.98. Each head then reads as few keys as this
        takes by estimate, at least `min_k` and at most `max_k`; `top_k` is where the search begins. Not for "lift",
        whose sample is of fixed size. None: `top_k` keys, whatever they hold.
    min_k: each head reads at least this many keys if `mass` is given.
    max_k: each head reads at most this many keys if `mass` is given.
    verify_every: one step in this many is also computed exactly, to report the error. The stats hold what was found;
        the output does not change. 0 checks none.
    share_group: a key retrieved for one query head is attended by its whole group of heads. It has been read from
        memory anyway. False restores one top-k per head, as in the paper.
    build_queries: this many prefill queries per head teach the index what will be asked. They are spread over the
        prompt; the last 256 queries are kept beside them.
    prefill: prompts attend in full (dense), as each head needs (auto), by a named pattern, or by those of a .json file.
        "dense" is exact. "auto" lets each head leave out what a sample of its queries hardly attends to, by
        the cheapest pattern that suffices, in chunks that have at least `dense_below` keys before their end; heads for
        which nothing pays stay dense. "a_shape", "vertical_slash" and "block_sparse" give every head that pattern at
        the sizes of MInference's paper, and the path of a .json file (from `retrieval-attn search-patterns`, or as
        MInference publishes them) gives each head its own. Fewer than 512 tokens at once are exact in any case, and in
        `generate` and sessions so are the last 256 tokens of a prompt.
    prefill_mass: prefill "auto" keeps this share of the attention mass. What is left out is at most 1 minus it, as a
        root mean square over queries that had no part in the choice. The relative error of the output may be three
        times that, or a fifth (bench/results/kernels-*.json).
    dense_below: prefill "auto" stays dense where a context is shorter than this. None: 16384. Dense attention and
        the cheapest pattern took about as long there on a CPU (bench/results/kernels-*.json).
    exact_below: a far context shorter than this is scanned exactly instead of indexed. Building would cost more than it
        saves. 0 always builds.
    prefill_chunk: this many prompt tokens go through the model in one forward pass. This bounds the memory of
        activations.
    prefill_tile: one attention call of exact prefill sees this many earlier keys. This bounds what is on the device at
        once. Sparse prefill brings all keys and values of a layer there, one layer at a time.
    device_kv_budget: prefill may keep this many bytes of keys and values on the device. Later chunks need not bring
        them back from CPU memory then; the near window comes on top. They stay there for later turns. Without a GPU
        nothing is kept twice. None: what is free at the first chunk, less a reserve.
    followup: the tokens of a later turn attend to all that the cache holds, or they retrieve. "exact" streams all of it
        to the device in tiles; "retrieve" finds keys, as generated tokens do, and takes no pass over all keys.
    kv_dtype: keys and values are stored in the model's dtype, or in half the memory. "int8" has a scale for every head
        and coordinate. The near window stays in the model's dtype.
    kv_dir: this folder holds keys and values, as memory-mapped files, for what exceeds the memory. The files have no
        names and are gone when the process is. What a fork or a restored session has in common with others and then
        writes anew takes memory. None: all stay in memory.
    max_tokens: a context has at most this many tokens. None: the model's maximum.
    max_host_bytes: the keys and values of one cache take at most this many bytes on the host. None: no limit.
    seed: this seed makes index builds repeatable, and what a benchmark draws.
    threads: this many CPU threads work. While an index is built beside a request, this package's loops on either side
        get half of them; PyTorch's own threads stay as many. Between loops threads sleep (see `load`). None: all cores.

    Raises ValueError naming the field, the rule and the value; unknown names are errors (TypeError).
    """

    index: str = "auto"
    top_k: int = 100
    n_sink: Tokens = 128
    n_local: Tokens = 512
    effort: int | None = None
    estimator: str = "tail"
    mass: float | None = None
    min_k: int = 16
    max_k: int = 2048
    verify_every: int = 0
    share_group: bool = True
    build_queries: int = 1024
    prefill: str = "dense"
    prefill_mass: float = 0.98
    dense_below: Tokens | None = None
    exact_below: Tokens = 2048
    prefill_chunk: Tokens = 2048
    prefill_tile: Tokens = 65536
    device_kv_budget: Bytes | None = None
    followup: str = "exact"
    kv_dtype: str = "auto"
    kv_dir: str | None = None
    max_tokens: Tokens | None = None
    max_host_bytes: Bytes | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        for name, least in _LEAST_IF_GIVEN.items():
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least)
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        self._check_mass()
        self._check_prefill()
        if not isinstance(self.share_group, bool):
            raise ValueError(f"share_group must be True or False, got {self.share_group!r}")
        # A session's manifest holds the config as plain data.
        if self.kv_dir is not None and not isinstance(self.kv_dir, str):
            raise ValueError(f"kv_dir must be the path of a folder as a str, or None, got {self.kv_dir!r}")

    def _check_mass(self) -> None:
        if self.min_k > self.max_k:
            raise ValueError(f"min_k must be at most max_k ({self.max_k}), got {self.min_k}")
        if self.mass is None:
            return
        _check_share("mass", self.mass)
        if self.estimator == "lift":
            raise ValueError("mass must be None with estimator 'lift', whose sample is of fixed size; use 'tail'")

    def _check_prefill(self) -> None:
        _check_share("prefill_mass", self.prefill_mass)
        # Whether the file is there is found out when a model is at hand to read it for.
        if not isinstance(self.prefill, str) or (self.prefill not in PREFILLS and not self.prefill.endswith(".json")):
            allowed = ", ".join(map(repr, PREFILLS))
            raise ValueError(f"prefill must be one of {allowed}, or the path of a .json file, got {self.prefill!r}")

        if self.prefill != "dense" and self.prefill_chunk < FEWEST_SPARSE:
            raise ValueError(
                f"prefill_chunk must be at least {FEWEST_SPARSE} with prefill={self.prefill!r}, because fewer tokens "
                f"at once attend exactly, got {self.prefill_chunk}"
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "RetrievalConfig":
        """A config from plain data, such as a saved session; unknown names raise ValueError with the allowed ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown config field {unknown[0]!r}; the fields are {', '.join(known)}")
        return cls(**options)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer ends.

    max_new_tokens: an answer has at most this many tokens.
    temperature: tokens are drawn this freely; 0 takes the likeliest one.
    top_p: tokens are drawn from the likeliest ones that hold this share of the probability. 1 leaves all.
    top_k: tokens are drawn from this many of the likeliest ones; 0 leaves all. On the command line it is
        `sample_top_k`, because `top_k` is a word of retrieval there.
    seed: this seed makes draws repeatable.
    """

    max_new_tokens: Tokens = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = field(default=0, metadata={"option": "sample_top_k"})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")


# The fields that are one of a few names.
ALLOWED = {"index": INDEX_KINDS, "estimator": ESTIMATORS, "followup": FOLLOWUPS, "kv_dtype": KV_DTYPES}

_LEAST_IF_GIVEN = {
    "effort": 1,
    "threads": 1,
    "dense_below": 1,
    "device_kv_budget": 0,
    "max_tokens": 1,
    "max_host_bytes": 1,
}

_LEAST = {
    "top_k": 1,
    "n_sink": 0,
    "n_local": 1,
    "build_queries": 1,
    "exact_below": 0,
    "min_k": 1,
    "max_k": 1,
    "verify_every": 0,
    "prefill_chunk": 1,
    "prefill_tile": 1,
    "seed": 0,
}


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name} must be above 0 and below 1 (a share of the attention mass), got {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
