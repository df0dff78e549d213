"""Keys, values and queries to judge an index on: real ones, ones shaped like real ones, and adversarial ones.

The front door: everything is asked for here.

    found = vectors("shaped", S=131072, seed=0)
    found = vectors("real:1", S=131072, seed=0)         # layer 1 of the embedded model, over a document
    found.keys, found.prefill_queries, found.queries, found.values
"""

from pathlib import Path

import torch

from retrieval_attn.bench.vectors.adversarial import ADVERSARIAL, adversarial
from retrieval_attn.bench.vectors.base import Vectors
from retrieval_attn.bench.vectors.capture import capture
from retrieval_attn.bench.vectors.measure import PROPERTIES, measure, properties_table
from retrieval_attn.bench.vectors.real import Capture, load_capture
from retrieval_attn.bench.vectors.shaped import shaped

__all__ = [
    "PROPERTIES",
    "SOURCES",
    "Capture",
    "Vectors",
    "capture",
    "check_source",
    "load_capture",
    "measure",
    "properties_table",
    "shaped",
    "vectors",
]

# "real" stands for "real:<layer>".
SOURCES = ("real", "shaped", *ADVERSARIAL)


def vectors(
    source: str,
    *,
    S: int,
    seed: int,
    H: int = 32,
    G: int = 8,
    D: int = 128,
    n_prefill: int = 1280,
    n_heldout: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    model: str | None = None,
    text: str | None = None,
    captured: Capture | str | Path | None = None,
) -> Vectors:
    """Vectors of one layer; the same arguments give the same vectors.

    source: "real:<layer>", "shaped", "uniform", "giant", "duplicates", "zeros", "self" or "drift".
    S: keys; H: query heads; G: KV heads; D: head dimension. A real layer has the H, G and D that it has.
    n_prefill, n_heldout: queries per head, to build from and to judge by, never the same.
    model, text: of "real", see `capture`. captured: what `capture` returned, or a file that `Capture.save` wrote; a
    model is then not run, and model, text and seed play no part.
    Raises ValueError for an unknown source, for shapes that no layer has and for more than a capture holds.
    """
    name, layer = check_source(source)
    if name == "shaped":
        return shaped(S, H, G, D, n_prefill, n_heldout, seed, dtype)
    if name != "real":
        return adversarial(name, S, H, G, D, n_prefill, n_heldout, seed, dtype)
    if layer is None:
        raise ValueError('source must name a layer, such as "real:1", got "real"')
    if captured is None:
        captured = capture(S, seed=seed, model=model, text=text, n_heldout=n_heldout)
    elif not isinstance(captured, Capture):
        captured = load_capture(captured)
    return captured.vectors(layer, S, n_prefill, n_heldout, dtype)


def check_source(source: str) -> tuple[str, int | None]:
    """The name of a source and the layer it asks for, if any; ValueError for what is none."""
    name, colon, layer = source.partition(":")
    if name not in SOURCES or (colon and (name != "real" or not layer.isdecimal())):
        raise ValueError(f"source must be one of real:<layer>, {', '.join(SOURCES[1:])}, got {source!r}")
    return name, int(layer) if colon else None
