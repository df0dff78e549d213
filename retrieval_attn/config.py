"""All options of the runtime, in one frozen dataclass whose fields are checked where it is made."""

from dataclasses import dataclass, fields
from typing import Any

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


@dataclass(frozen=True)
class RetrievalConfig:
    """How far keys are found, and what stays near.

    index: which index finds far keys. "graph" looks at a few per cent of the keys and is the paper's method; "scan"
        looks at all of them through a fraction of their bytes, and needs no building; "page" opens the most promising
        runs of consecutive keys; "exact" scans all keys (the oracle, and the honest baseline); "ivf" is faiss's
        inverted file, the usual baseline; "auto" chooses by length, memory and use, and says why in the stats.
    top_k: keys retrieved per query head, as in the paper (100; hard key-value lookups want up to 2000). `top_k` at
        least as large as the far context gives full attention.
    n_sink: first tokens of the context that stay near; the paper's 128 hold the attention sink.
    n_local: last tokens that stay near; the paper's 512. At least 1: the newest token is always near.
    effort: search effort of the index (beam width of "graph", lists probed by "ivf"); None lets the index choose
        from `top_k`.
    estimator: what the retrieved keys stand for. "tail" adds the estimated contribution of the keys that were not
        retrieved, from page means and a covariance (kernels/tail.py): at 100 keys read, the error of the output was
        0.38 of that of "topk" on synthetic vectors, 0.24, 0.47 and 0.8 on the layers of the embedded model. "lift"
        retrieves a weighted sample instead of the best keys, unbiased on average (SoftmaxLift). "topk" renormalises
        over the best keys, as in the paper.
    mass: None, or the share of the attention mass that retrieval should recover (such as 0.98): each head then reads
        as few keys as this takes by estimate, at least `min_k` and at most `max_k`; `top_k` is where the search begins.
        Not for "lift", whose sample is of fixed size.
    verify_every: every so many steps, the step is also computed exactly, and the errors found are reported in the
        stats; the output does not change. 0 never does.
    share_group: a key retrieved for one query head is attended by its whole group of heads, because it has been
        read from memory anyway. False restores one top-k per head, as in the paper.
    build_queries: how many prefill queries per head, spread over the prompt, teach the index what will be asked. The
        last 256 queries are kept beside them.
    exact_below: a far context shorter than this is scanned exactly instead of indexed, because building would cost
        more than it saves. 0 always builds.
    prefill: how a prompt attends to itself. "dense" is exact. "auto" lets each head leave out what a sample of its
        queries hardly attends to, by the cheapest pattern that suffices, in chunks that have at least `dense_below`
        keys before their end; heads for which nothing pays stay dense. "a_shape", "vertical_slash" and "block_sparse"
        give every head that pattern at the sizes of MInference's paper, and the path of a .json file (from
        `retrieval-attn search-patterns`, or as MInference publishes them) gives each head its own. Fewer than 512
        tokens at once are exact in any case, and in `generate` and sessions so are the last 256 tokens of a prompt.
    prefill_mass: of "auto", the share of the attention mass that is kept; what is left out is at most 1 minus it, as a
        root mean square over queries that had no part in the choice. The relative error of the output may be three
        times that, or a fifth (bench/results/kernels-*.json).
    dense_below: of "auto", where sparse attention begins to pay, in tokens; None is 16384, where dense attention and
        the cheapest pattern took about as long on a CPU (bench/results/kernels-*.json).
    prefill_chunk: prompt tokens per forward pass; bounds the memory of activations.
    prefill_tile: earlier keys that one attention call of exact prefill sees; bounds what is on the device at once.
        Sparse prefill brings all keys and values of a layer there, one layer at a time.
    device_kv_budget: bytes of keys and values that prefill may keep on the device, so that later chunks need not bring
        them back from CPU memory; the near window comes on top. None: what is free at the first chunk, less a reserve
        for activations. It stays there for later turns. Without a GPU nothing is kept twice.
    followup: how the tokens of a later turn attend to what the cache holds: "exact"ly, streamed to the device in tiles;
        or they "retrieve", as generated tokens do, which takes no pass over all keys.
    kv_dtype: "auto" keeps keys and values in the model's dtype; "int8" in half the memory, with a scale for every head
        and coordinate. The near window stays in the model's dtype.
    kv_dir: a folder for the keys and values, which are then memory-mapped files, for what exceeds the memory. The files
        have no names and are gone when the process is. What a fork or a restored session has in common with others and
        then writes anew takes memory. None keeps all in memory.
    max_tokens: a hard limit for a context; None leaves it to the model.
    max_host_bytes: a hard limit for the keys and values of one cache on the host; None leaves it to the machine.
    seed: makes index builds repeatable.
    threads: CPU threads; None means all cores. While an index is built beside a request, this package's loops on either
        side get half of them; PyTorch's own threads stay as many.

    Raises ValueError naming the field, the rule and the value; unknown names are errors (TypeError).
    """

    index: str = "graph"
    top_k: int = 100
    n_sink: int = 128
    n_local: int = 512
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
    dense_below: int | None = None
    exact_below: int = 2048
    prefill_chunk: int = 2048
    prefill_tile: int = 65536
    device_kv_budget: int | None = None
    followup: str = "exact"
    kv_dtype: str = "auto"
    kv_dir: str | None = None
    max_tokens: int | None = None
    max_host_bytes: int | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        for name, least in _LEAST_IF_GIVEN.items():
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least)
        for name, allowed in _ALLOWED.items():
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


_ALLOWED = {"index": INDEX_KINDS, "estimator": ESTIMATORS, "followup": FOLLOWUPS, "kv_dtype": KV_DTYPES}

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
