"""The attention-aware graph index: per KV head, a tree and links over its keys, shaped by what its queries ask.

    metric    what the sampled queries of all heads of the group can tell apart                      graph/metric.py
    cells     a tree of two levels over the keys: where a search begins                              graph/cells.py
    links     from each key to keys that the same queries want: where it goes on                     graph/links.py
    search    the keys of the most promising leaves, then best-first along the links                 graph/search.py
    append    new keys get cells of their own, and links                                             graph/append.py

After RetrievalAttention (arXiv 2409.10516) and RoarGraph (arXiv 2408.08933), which link keys that stand together among
the exact nearest keys of a sampled query. Here the queries say how near keys are, and near keys are linked. As many
links find more that way, on real and on synthetic vectors, and no sampled query has to be compared with every key.
"""

from os import PathLike
from typing import Any, NamedTuple, Self

import numpy as np

from retrieval_attn.arrays import Array, as_array
from retrieval_attn.compiled import jit
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan, scan_all
from retrieval_attn.index.graph.append import add_cells, links_below, with_room
from retrieval_attn.index.graph.cells import Cells, grow_cells, joined, without
from retrieval_attn.index.graph.links import link_cells
from retrieval_attn.index.graph.metric import Metric, fit_metric
from retrieval_attn.index.graph.search import N_FIRST, search_graphs
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.over_keys import OverKeys
from retrieval_attn.index.protocol import (
    Batch,
    SearchResult,
    Steps,
    check_effort,
    check_search,
    lifted_queries,
)


class State(NamedTuple):
    """What changes on append; replaced as a whole."""

    keys: Keys
    cells: Cells
    links: Array  # (G, capacity, M) int32, each list padded with -1 at its end
    n_linked: int  # keys after these are scanned


class GraphIndex(OverKeys[State]):
    """Best-first search over linked keys; the newest keys are scanned. Effort is the width of the beam."""

    kind = "graph"

    def __init__(self, state: State, metrics: list[Metric], leaf: int, tail: int, owner: bool = True) -> None:
        """owner: whether nobody else writes into the links, so that this index may."""
        super().__init__(state)
        self._owner = owner
        self._metrics = metrics
        self._leaf = leaf
        self._tail = tail

    @classmethod
    def build(
        cls,
        keys: Keys,
        queries: Array | None,
        seed: int,
        steps: Steps,
        degree: int = 12,
        leaf: int = 2,
        tail: int = 2048,
    ) -> Self:
        """Build one graph per KV head from the queries of all its query heads.

        Without queries, the keys of each head, centred, stand in for them.

        degree: links per key.
        leaf: keys per leaf of the tree, in the mean.
        tail: appended keys scanned exactly before they are linked together; a 64th of the keys, if that is more.
        """
        for name, value, least in (("degree", degree, 4), ("leaf", leaf, 1), ("tail", tail, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        n_heads, n_keys, _ = keys.shape
        links = np.full((n_heads, n_keys, degree), -1, np.int32)
        trees, metrics = [], []
        for head in range(n_heads):
            part = steps.part(head / n_heads, 1 / n_heads)
            rows = keys.lifted(head)
            asked = rows - rows.mean(axis=0) if queries is None else group_queries(queries, keys, head)
            metric = fit_metric(rows, asked)
            points = metric.points(rows)
            tree = grow_cells(rows, points, 0, leaf, [seed, head], part.part(0.0, 0.4))
            link_cells(tree, 0, metric, points.__getitem__, 0, links[head], part.part(0.4, 0.6))
            trees.append(tree)
            metrics.append(metric)
        return cls(State(keys, joined(trees), links, n_keys), metrics, leaf, tail)

    @property
    def nbytes(self) -> int:
        """Links (with room to grow), tree, metric and bonuses."""
        keys, cells, links, _ = self._state
        arrays = (keys.bonus, links, *cells, *(x for metric in self._metrics for x in metric))
        return int(sum(x.nbytes for x in arrays))

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; effort: width of the beam, at least k, by default 1.2 k and no less than 120."""
        state = self._state
        keys, _, _, n_linked = state
        batch = check_search(q, k, keys)
        effort = max(check_effort(effort, max(6 * k // 5, 120)), k)
        n_keys = keys.shape[1]
        # A search that would read all linked keys anyway; so also when all keys are asked for.
        if effort * N_FIRST >= n_linked:
            return scan_all(keys, batch)
        ids, scores, visited = self._search_linked(state, batch, effort, seeds)
        if n_keys > n_linked:
            tail_ids, tail_scores = scan(keys, batch.queries, k, n_linked, n_keys)
            ids, scores = merge_ranked(ids, scores, tail_ids, tail_scores)
            visited += n_keys - n_linked
        return batch.result(ids, scores, visited)

    def _search_linked(self, state: State, batch: Batch, effort: int, seeds: Any) -> tuple[Array, Array, Array]:
        keys, cells, links, n_linked = state
        n_heads, n_queries, _ = batch.queries.shape
        ids = np.empty((n_heads, n_queries, batch.k), np.int32)
        scores = np.empty((n_heads, n_queries, batch.k), np.float32)
        visited = np.empty((n_heads, n_queries), np.int64)
        asked = as_seeds(seeds, batch), lifted_queries(batch.queries, keys), effort
        search_graphs(keys.flat, cells, links, n_linked, *asked, ids, scores, visited)
        return ids, scores, visited

    def _grow(self, keys: Keys) -> None:
        """New keys are scanned; when more than `tail` are, all of them are linked, at once."""
        _, cells, links, n_linked = self._state
        n_keys = keys.shape[1]
        if n_keys - n_linked <= max(self._tail, n_linked // 64):
            self._state = State(keys, cells, links, n_linked)
            return
        links = with_room(links, self._owner, n_linked, n_keys)
        # Should this be interrupted, the next append goes on from a copy without what was written.
        self._owner = False
        cells = add_cells(cells, keys, self._metrics, n_linked, links, self._leaf)
        self._state = State(keys, cells, links, n_keys)
        self._owner = True

    def _shrink(self, keys: Keys) -> None:
        _, cells, links, n_linked = self._state
        n_keys = keys.shape[1]
        if n_keys >= n_linked:
            self._state = State(keys, cells, links, n_linked)
            return
        self._state = State(keys, without(cells, n_keys), links_below(links, n_keys, n_keys), n_keys)
        self._owner = True

    def _forked(self, state: State, keys: Keys) -> Self:
        return type(self)(state._replace(keys=keys), self._metrics, self._leaf, self._tail, owner=False)

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        with self._lock:
            keys, cells, links, n_linked = self._state
            arrays = {f"cells.{name}": array for name, array in cells._asdict().items()}
            arrays |= {
                f"metric.{name}": np.stack(rows)
                for name, rows in zip(Metric._fields, zip(*self._metrics, strict=True), strict=True)
            }
            arrays["links"] = links[:, :n_linked] if self._owner else links_below(links, n_linked, n_linked)
            storage.write(path, self.kind, {"leaf": self._leaf, "tail": self._tail}, arrays, keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> Self:
        links = saved.arrays["links"]
        cells = Cells(*(saved.arrays[f"cells.{name}"] for name in Cells._fields))
        metrics = [
            Metric(*rows) for rows in zip(*(saved.arrays[f"metric.{name}"] for name in Metric._fields), strict=True)
        ]
        return cls(State(saved.keys, cells, links, links.shape[1]), metrics, **saved.settings)


def group_queries(queries: Array, keys: Keys, head: int) -> Array:
    """The sampled queries (H, T, D) of all heads that read KV head `head`: (R T, E)."""
    rows = queries.reshape(keys.shape[0], -1, queries.shape[-1])[head]
    return lifted_queries(rows, keys)


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
