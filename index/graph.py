"""The attention-aware graph index: one graph per KV head, built from what its queries wanted during prefill.

`graph_build.py` makes the graphs, `graph_search.py` searches them, `graph_append.py` links new keys.
"""

import threading
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.host import Array, as_array, jit
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan
from retrieval_attn.index.graph_append import forget, link_new
from retrieval_attn.index.graph_build import build_head
from retrieval_attn.index.graph_search import search_graphs
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.lift import Lift
from retrieval_attn.index.protocol import Batch, SearchResult, Steps, check_effort, check_search, check_truncate

# A search begins at the hubs and at the best 64 keys of the 4 stored queries most like it.
N_PICKS = 4
N_WANTED = 64


class State(NamedTuple):
    """What changes on append; replaced as a whole."""

    keys: Keys
    links: Array  # (G, capacity, M) int32
    n_linked: int  # keys after these are scanned


class GraphIndex:
    """Best-first search over linked keys; the newest keys are scanned. Effort is the width of the beam."""

    kind = "graph"

    def __init__(self, state: State, hubs: Array, anchors: Array, wanted: Array, tail: int) -> None:
        self._state = state
        self._hubs = hubs
        self._anchors = anchors
        self._wanted = wanted
        self._anchor_rows = Keys(anchors)
        self._tail = tail
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls,
        keys: Keys,
        queries: Array | None,
        seed: int,
        steps: Steps,
        degree: int = 32,
        max_queries: int = 2048,
        list_size: int = 100,
        near: int = 8,
        n_hubs: int = 16,
        n_anchors: int = 256,
        slack: float = 1.4,
        tail: int = 2048,
    ) -> "GraphIndex":
        """Build one graph per KV head from the queries of all its query heads.

        Without queries, the keys of each head, centred, stand in for them: recall is then lower, as for any graph
        that has not seen queries.

        degree: links per key.
        max_queries: sampled queries per KV head; more than these are thinned evenly over heads and positions.
        list_size: exact nearest keys computed per sampled query.
        near: neighbours per key taken from each of its two nearest clusters.
        slack: a link is left out if a kept one is this many times nearer (squared) to its end; large keeps all.
        n_hubs: keys most often wanted, where searches begin.
        n_anchors: sampled queries kept, at whose best keys searches also begin.
        tail: appended keys scanned exactly before they are linked together.
        """
        for name, value, least in (
            ("degree", degree, 4), ("max_queries", max_queries, 1), ("list_size", list_size, 1), ("near", near, 1),
            ("n_hubs", n_hubs, 1), ("n_anchors", n_anchors, 1), ("slack", slack, 0.5), ("tail", tail, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        n_heads, n_keys, _ = keys.shape
        graphs = []
        for head in range(n_heads):
            points = keys.float32(head)
            rng = np.random.default_rng([seed, head])
            asked = sample_keys(points, max_queries, rng) if queries is None else None
            if queries is not None:
                asked = thinned(queries.reshape(n_heads, -1, points.shape[1])[head], max_queries)
            graph = build_head(
                points, asked, degree=degree, list_size=list_size, near=near, slack=slack, n_hubs=n_hubs,
                n_anchors=n_anchors, n_wanted=N_WANTED, rng=rng, steps=steps.part(head / n_heads, 1 / n_heads),
            )  # fmt: skip
            graphs.append(graph)
        hubs = np.full((n_heads, max(len(g.hubs) for g in graphs)), -1, np.int32)
        for row, graph in zip(hubs, graphs, strict=True):
            row[: len(graph.hubs)] = graph.hubs
        stack = lambda name: np.stack([getattr(graph, name) for graph in graphs])  # noqa: E731
        return cls(State(keys, stack("links"), n_keys), hubs, stack("anchors"), stack("wanted"), tail)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._state.keys.shape

    @property
    def n_keys(self) -> int:
        return self.shape[1]

    @property
    def lift(self) -> Lift | None:
        return self._state.keys.lift

    @property
    def nbytes(self) -> int:
        """Links (with room to grow), hubs, stored queries and their lists."""
        return self._state.links.nbytes + self._hubs.nbytes + self._anchors.nbytes + self._wanted.nbytes

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; effort: width of the beam, at least k, by default 2 k and no less than 128."""
        keys, links, n_linked = self._state
        batch = check_search(q, k, keys)
        effort = max(check_effort(effort, max(2 * k, 128)), k)
        n_keys = keys.shape[1]
        # A beam that could hold all linked keys; so also when all keys are asked for.
        if effort >= n_linked:
            ids, scores = scan(keys, batch.queries, k, 0, n_keys)
            return batch.result(ids, scores, np.full(ids.shape[:2], n_keys, np.int64))
        n_heads, n_queries, _ = batch.queries.shape
        ids = np.empty((n_heads, n_queries, k), np.int32)
        scores = np.empty((n_heads, n_queries, k), np.float32)
        visited = np.empty((n_heads, n_queries), np.int64)
        starts = self._starts(batch, seeds)
        search_graphs(*keys.flat, n_linked, links, starts, batch.queries, effort, ids, scores, visited)
        if n_keys > n_linked:
            tail_ids, tail_scores = scan(keys, batch.queries, k, n_linked, n_keys)
            ids, scores = merge_ranked(ids, scores, tail_ids, tail_scores)
            visited += n_keys - n_linked
        return batch.result(ids, scores, visited)

    def _starts(self, batch: Batch, seeds: Any) -> Array:
        """Where each search begins: (G, N, n) ids, -1 to be skipped."""
        n_heads, n_queries, _ = batch.queries.shape
        picks, _ = scan(self._anchor_rows, batch.queries, N_PICKS, 0, self._anchors.shape[1])
        hubs = np.broadcast_to(self._hubs[:, None], (n_heads, n_queries, self._hubs.shape[1]))
        wanted = self._wanted[np.arange(n_heads)[:, None, None], picks].reshape(n_heads, n_queries, -1)
        return np.concatenate([as_seeds(seeds, batch), hubs, wanted], axis=2)

    def append(self, new_keys: Any, *, keys: Any = None) -> None:
        """See `Index.append`. New keys are scanned; when more than `tail` are, all of them are linked, in this call."""
        with self._lock:
            old, links, n_linked = self._state
            grown = old.grown(new_keys, keys)
            n_keys = grown.shape[1]
            if n_keys - n_linked > self._tail:
                links = with_room(links, n_linked, n_keys)
                link_new(*grown.flat, n_linked, n_keys, links, self._hubs, self._anchors, self._wanted)
                n_linked = n_keys
            self._state = State(grown, links, n_linked)

    def truncate(self, n_keys: int) -> None:
        """See `Index.truncate`."""
        with self._lock:
            check_truncate(n_keys, self.n_keys)
            keys, links, n_linked = self._state
            if n_keys < n_linked:
                # Searches that still run keep the arrays they began with.
                self._hubs, self._wanted = self._hubs.copy(), self._wanted.copy()
                links = forget(links, self._hubs, self._wanted, n_keys)
            self._state = State(keys.first(n_keys), links, min(n_linked, n_keys))

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        with self._lock:
            keys, links, n_linked = self._state
            arrays = {
                "links": links[:, :n_linked], "hubs": self._hubs, "anchors": self._anchors, "wanted": self._wanted,
            }  # fmt: skip
            storage.write(path, self.kind, {"tail": self._tail}, arrays, keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> "GraphIndex":
        links = saved.arrays["links"]
        state = State(saved.keys, links, links.shape[1])
        return cls(state, saved.arrays["hubs"], saved.arrays["anchors"], saved.arrays["wanted"], **saved.settings)


def thinned(queries: Array, n: int) -> Array:
    """At most n of the rows, evenly spaced."""
    if len(queries) <= n:
        return np.ascontiguousarray(queries)
    return queries[np.linspace(0, len(queries) - 1, n).astype(np.int64)]


def sample_keys(keys: Array, n: int, rng: np.random.Generator) -> Array:
    """At most n keys, centred: what stands in for queries when there are none."""
    chosen = rng.choice(len(keys), min(n, len(keys)), replace=False)
    return keys[chosen] - keys.mean(axis=0)


def as_seeds(seeds: Any, batch: Batch) -> Array:
    """Seeds (H, n) or (H, T, n) as (G, N, n) int32."""
    n_heads, n_queries, _ = batch.queries.shape
    if seeds is None:
        return np.empty((n_heads, n_queries, 0), np.int32)
    array = as_array(seeds, "seeds")
    if array.dtype.kind not in "iu" or array.shape[:-1] not in (batch.lead, batch.lead[:1]):
        raise ValueError(f"seeds must be integers {(*batch.lead, 'n')}, got {array.dtype} {array.shape}")
    if len(batch.lead) == 2 and array.ndim == 2:
        array = np.repeat(array[:, None], batch.lead[1], axis=1)
    return np.ascontiguousarray(array.reshape(n_heads, n_queries, -1), np.int32)


def with_room(links: Array, n_linked: int, n_keys: int) -> Array:
    """`links` with room for n_keys: itself, or a copy with an eighth to spare."""
    n_heads, capacity, degree = links.shape
    if capacity >= n_keys:
        return links
    roomy = np.full((n_heads, n_keys + n_keys // 8, degree), -1, np.int32)
    roomy[:, :n_linked] = links[:, :n_linked]
    return roomy


@jit()
def merge_ranked(ids_a: Array, scores_a: Array, ids_b: Array, scores_b: Array) -> tuple[Array, Array]:
    """Two lists, each best first and with no id in common, as one list as long as the first."""
    ids, scores = np.empty_like(ids_a), np.empty_like(scores_a)
    n_heads, n_queries, k = ids.shape
    for head in range(n_heads):
        for query in range(n_queries):
            i, j = 0, 0
            for at in range(k):
                a = scores_a[head, query, i]
                if j < ids_b.shape[2] and (scores_b[head, query, j] > a or ids_a[head, query, i] < 0):
                    ids[head, query, at] = ids_b[head, query, j]
                    scores[head, query, at] = scores_b[head, query, j]
                    j += 1
                else:
                    ids[head, query, at] = ids_a[head, query, i]
                    scores[head, query, at] = a
                    i += 1
    return ids, scores
