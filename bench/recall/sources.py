"""The layers that `bench recall` searches in, with one run of a model for all of its own."""

from collections.abc import Callable

import torch

from retrieval_attn.bench.recall.measure_layer import Layer
from retrieval_attn.bench.recall.options import Options
from retrieval_attn.bench.recall.truth import Truth
from retrieval_attn.bench.shared.machine import require_memory
from retrieval_attn.bench.vectors.sources import Capture, Vectors, capture, check_source, load_capture, measure, vectors
from retrieval_attn.terminal.files import read_text

N_PREFILL = 1280


class Sources:
    """Makes vectors; keeps the last capture. Raises ValueError if the file of real vectors is there and holds none."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        path = options.capture
        self._captured = load_capture(path) if path is not None and path.exists() else None
        self._made_for: tuple[int, int] | None = None

    def layers(self, source: str, context: int, seed: int) -> list[str]:
        """The sources meant: every layer for "real". Runs the model if need be."""
        name, layer = check_source(source)
        if name != "real" or layer is not None:
            return [source]
        return [f"real:{i}" for i in self._capture(context, seed).layers]

    def layer(self, source: str, context: int, seed: int) -> tuple[Layer, dict[str, float]]:
        """The layer to search in, with what is true of it, and the properties of its vectors."""
        found = self.vectors(source, context, seed)
        return Layer(source, context, seed, found, Truth.of(found, self._options.top_k)), measure(found)

    def vectors(self, source: str, context: int, seed: int) -> Vectors:
        """Vectors of one layer; ValueError or MemoryError if they cannot be had.

        A real layer gives as many queries as were captured, if fewer than asked for.
        """
        options = self._options
        dtype = getattr(torch, options.dtype)
        captured = self._capture(context, seed) if check_source(source)[0] == "real" else None
        if captured is not None:
            n_prefill, n_heldout = map(min, (N_PREFILL, options.queries), captured.n_queries(context))
            return vectors(
                source, S=context, seed=seed, n_prefill=n_prefill, n_heldout=n_heldout, dtype=dtype, captured=captured
            )
        H, G, D = options.shape
        n_bytes = 2 * G * context * D * dtype.itemsize
        # In float32 and for a moment: a head's keys and values, their scores for some queries.
        require_memory(n_bytes + 16 * context * D + (1 << 29), f"vectors of {context} keys")
        return vectors(
            source, S=context, seed=seed, H=H, G=G, D=D, n_prefill=N_PREFILL, n_heldout=options.queries, dtype=dtype
        )

    def _capture(self, context: int, seed: int) -> Capture:
        """From the file named, if it is there; else made, and written to that file, for the longest context."""
        options, path = self._options, self._options.capture
        if self._captured is not None and self._made_for in (None, (context, seed)):
            return self._captured
        S = context if path is None else max(options.contexts)
        text = None if options.text is None else read_text(str(options.text))
        self._captured = capture(
            S, seed=seed, model=options.model, text=text, n_heldout=max(256, options.queries), say=self._say
        )
        if path is None:
            self._made_for = context, seed
        else:
            self._captured.save(path)
        return self._captured
