"""Keys, values and queries that the attention layers of a real model were given: what a capture holds, and its file.

`capture.py` makes one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval_attn.atomic_file import replacing
from retrieval_attn.bench.vectors.base import Vectors

FORMAT = "retrieval-attn capture 1"


class LayerVectors(NamedTuple):
    """One layer: keys, values (G, S, D), queries asked by the document (H, T, D) and by the answers (H, T', D)."""

    keys: Tensor
    values: Tensor
    asked: Tensor
    heldout: Tensor


@dataclass(frozen=True)
class Capture:
    """What a model's full-attention layers were given while it read a document and answered questions about it.

    layers: by layer number. asked_at: (T,) int64, token of each query of the document. runs: (T',) int64, question that
    a held-out query answers. fact_at: (T',) int64, token where that question's fact begins. Keys are those of tokens
    first_key, first_key + 1, ... about: plain data on where all this comes from; `answered` is the share of answer
    tokens that the model itself would have said.
    """

    layers: dict[int, LayerVectors]
    asked_at: Tensor
    runs: Tensor
    fact_at: Tensor
    first_key: int
    about: dict[str, Any]

    @property
    def n_keys(self) -> int:
        return next(iter(self.layers.values())).keys.shape[1]

    def n_queries(self, S: int) -> tuple[int, int]:
        """Queries of the document that were asked among the last S keys, and queries of answers found among them."""
        first = self.first_key + self.n_keys - S
        return int((self.asked_at >= first).sum()), int((self.fact_at >= first).sum())

    def vectors(
        self,
        layer: int,
        S: int | None = None,
        n_prefill: int | None = None,
        n_heldout: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Vectors:
        """One layer's vectors; None gives everything, as captured.

        S: only the last S keys, with the queries asked among them and the answers found among them.
        n_prefill: an even choice of the document's queries. n_heldout: the first of the held-out ones.
        Raises ValueError for a layer that is not there and for more than was captured.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(map(str, self.layers))}, got {layer}")
        found = self.layers[layer]
        S = self.n_keys if S is None else S
        if not 1 <= S <= self.n_keys:
            raise ValueError(f"S must be between 1 and {self.n_keys} (keys captured), got {S}")
        first = self.n_keys - S + self.first_key
        asked = _evenly(torch.nonzero(self.asked_at >= first)[:, 0], n_prefill, "n_prefill")
        heldout = torch.nonzero(self.fact_at >= first)[:, 0]
        n = len(heldout) if n_heldout is None else n_heldout
        if not 1 <= n <= len(heldout):
            raise ValueError(f"n_heldout must be between 1 and {len(heldout)} (answer tokens captured), got {n}")
        heldout = heldout[:n]
        parts = found.keys[:, -S:], found.asked[:, asked], found.heldout[:, heldout], found.values[:, -S:]
        keys, asked_queries, queries, values = (x.to(dtype or x.dtype).contiguous() for x in parts)
        return Vectors(keys, asked_queries, queries, values, self.runs[heldout])

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {"asked_at": self.asked_at, "runs": self.runs, "fact_at": self.fact_at}
        for i, layer in self.layers.items():
            tensors |= {f"{i}.{name}": x.contiguous() for name, x in layer._asdict().items()}
        about = {"format": FORMAT, "first_key": str(self.first_key), "about": json.dumps(self.about)}
        with replacing(path) as part:
            save_file(tensors, part, about)


def load_capture(path: str | Path) -> Capture:
    """Read what `Capture.save` wrote. Raises FileNotFoundError, or ValueError for any other file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no capture at {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a capture: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} must be a file of format {FORMAT!r}, got {about.get('format')!r}")
    numbers = sorted({int(name.split(".")[0]) for name in tensors if "." in name})
    layers = {i: LayerVectors(*(tensors[f"{i}.{name}"] for name in LayerVectors._fields)) for i in numbers}
    marks = tensors["asked_at"], tensors["runs"], tensors["fact_at"]
    return Capture(layers, *marks, int(about["first_key"]), json.loads(about["about"]))


def _evenly(choices: Tensor, n: int | None, name: str) -> Tensor:
    if n is None:
        return choices
    if not 1 <= n <= len(choices):
        raise ValueError(f"{name} must be between 1 and {len(choices)} (queries captured), got {n}")
    return choices[torch.linspace(0, len(choices) - 1, n).long()]
