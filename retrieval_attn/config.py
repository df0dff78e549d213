"""All options of the runtime, in one frozen dataclass whose fields are checked where it is made."""

from dataclasses import dataclass, fields
from typing import Any

INDEX_KINDS = ("exact", "ivf", "graph")


@dataclass(frozen=True)
class RetrievalConfig:
    """How far keys are found, and what stays near.

    index: which index finds far keys. "graph" looks at a few per cent of the keys and is the paper's method; "exact"
        scans all of them (the oracle, and the honest baseline); "ivf" is faiss's inverted file, the usual baseline.
    top_k: keys retrieved per query head, as in the paper (100; hard key-value lookups want up to 2000). `top_k` at
        least as large as the far context gives full attention.
    n_sink: first tokens of the context that stay near; the paper's 128 hold the attention sink.
    n_local: last tokens that stay near; the paper's 512. At least 1: the newest token is always near.
    effort: search effort of the index (beam width of "graph", lists probed by "ivf"); None lets the index choose
        from `top_k`.
    share_group: a key retrieved for one query head is attended by its whole group of heads, because it has been
        read from memory anyway. False restores one top-k per head, as in the paper.
    build_queries: how many prefill queries per head, spread over the prompt, teach the index what will be asked. The
        last 256 queries are kept beside them.
    exact_below: a far context shorter than this is scanned exactly instead of indexed, because building would cost
        more than it saves. 0 always builds.
    prefill_chunk: prompt tokens per forward pass; bounds the memory of activations.
    prefill_tile: earlier keys that one attention call of prefill sees; bounds what is on the device at once.
    seed: makes index builds repeatable.
    threads: CPU threads of this package's kernels; None means all cores.

    Raises ValueError naming the field, the rule and the value; unknown names are errors (TypeError).
    """

    index: str = "graph"
    top_k: int = 100
    n_sink: int = 128
    n_local: int = 512
    effort: int | None = None
    share_group: bool = True
    build_queries: int = 1024
    exact_below: int = 2048
    prefill_chunk: int = 2048
    prefill_tile: int = 65536
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.index not in INDEX_KINDS:
            raise ValueError(f"index must be one of {', '.join(map(repr, INDEX_KINDS))}, got {self.index!r}")
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        for name in ("effort", "threads"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if not isinstance(self.share_group, bool):
            raise ValueError(f"share_group must be True or False, got {self.share_group!r}")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "RetrievalConfig":
        """A config from plain data, such as a saved session; unknown names raise ValueError with the allowed ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown config field {unknown[0]!r}; the fields are {', '.join(known)}")
        return cls(**options)


_LEAST = {
    "top_k": 1,
    "n_sink": 0,
    "n_local": 1,
    "build_queries": 1,
    "exact_below": 0,
    "prefill_chunk": 1,
    "prefill_tile": 1,
    "seed": 0,
}


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
