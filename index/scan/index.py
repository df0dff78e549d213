"""Every key, every time, but through a sixth of its bytes or less: 4-bit codes, then exact scores of the best.

A key's code is made when the key arrives, from that key alone, in coordinates chosen from the first keys; once there
are half as many again, the coordinates are chosen anew, and all keys encoded again. Codes are scanned about as fast
as memory can be read. There is no second level of codes between these and the keys: after 4 bits a few hundred keys
remain, and scoring them exactly takes about a sixth of the time.
"""

import threading
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.lift import Lift
from retrieval_attn.index.protocol import SearchResult, Steps, check_effort, check_search, check_truncate
from retrieval_attn.index.scan.codes import Codes, extend
from retrieval_attn.index.scan.map import Map, fit
from retrieval_attn.index.scan.search import search_codes

# To rescore this share of the keys takes as long as to score all of them in one go.
EXACT_SHARE = 1 / 2

# Coordinates are chosen anew once there are so many times the keys that they were chosen from: later keys vary in
# directions that the first ones did not, and recall decays (0.74 against 0.97 after three times as many).
REFIT = 1.5

# Queries per KV head that are kept for it, evenly spread.
N_KEPT = 256


class Recipe(NamedTuple):
    """How coordinates are chosen. queries: (G, n, D) or None; dims as in `build`."""

    queries: Array | None
    seed: int
    dims: int | None


class State(NamedTuple):
    """Replaced as a whole, never changed: a search that holds an old one stays valid. n_fitted: the keys of `map`."""

    keys: Keys
    codes: Codes
    map: Map
    n_fitted: int


class ScanIndex:
    """4-bit codes of all keys. Effort is the number of keys per query that are scored exactly."""

    kind = "scan"

    def __init__(self, state: State, recipe: Recipe) -> None:
        self._state = state
        self._recipe = recipe
        self._lock = threading.Lock()

    @classmethod
    def build(cls, keys: Keys, queries: Array | None, seed: int, steps: Steps, dims: int | None = None) -> "ScanIndex":
        """Choose the coordinates that tell most about the scores of `queries`, and encode the keys.

        dims: numbers of 4 bits per key, at most D; None: as many as hold 95 % of what makes scores differ (see
            `scan_map.py`). Without `queries` all directions count alike, and it usually takes more of them.
        """
        if dims is not None and dims < 1:
            raise ValueError(f"dims must be at least 1, got {dims}")
        state = encoded(keys, Recipe(queries, seed, dims), steps)
        return cls(state, Recipe(None if queries is None else thinned(queries, keys.shape[0]), seed, dims))

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
        asked = 0 if self._recipe.queries is None else self._recipe.queries.nbytes
        keys, codes, coordinates, _ = self._state
        return codes.nbytes + sum(x.nbytes for x in coordinates) + asked + keys.bonus.nbytes

    def search(self, q: Any, k: int = 100, *, effort: int | None = None, seeds: Any = None) -> SearchResult:
        """See `Index.search`; effort: keys per query that are scored exactly, at least k; `seeds` change nothing."""
        keys, codes, coordinates, _ = self._state
        batch = check_search(q, k, keys)
        n_keys = keys.shape[1]
        n_wanted = max(check_effort(effort, default_effort(k)), k)
        if n_wanted >= EXACT_SHARE * n_keys:
            ids, scores = scan(keys, batch.queries, k, 0, n_keys)
        else:
            ids, scores = search_codes(keys, codes, coordinates.queries, batch.queries, k, n_wanted)
        return batch.result(ids, scores, np.full(ids.shape[:2], n_keys, np.int64))

    def append(self, new_keys: Any, *, keys: Any = None) -> None:
        """See `Index.append`. When there are half as many keys again, all are encoded anew, in this call."""
        with self._lock:
            old = self._state
            grown = old.keys.grown(new_keys, keys)
            n_keys = grown.shape[1]
            if n_keys >= REFIT * old.n_fitted:
                self._state = encoded(grown, self._recipe, Steps())
                return
            codes = old.codes.roomy(n_keys)
            for head in range(grown.shape[0]):
                extend(codes, grown, old.map, head)
            self._state = old._replace(keys=grown, codes=codes._replace(n_keys=n_keys))

    def truncate(self, n_keys: int) -> None:
        """See `Index.truncate`."""
        with self._lock:
            check_truncate(n_keys, self.n_keys)
            old = self._state
            # What is left of the keys that the coordinates were chosen from: others may follow.
            n_fitted = min(old.n_fitted, n_keys)
            self._state = State(old.keys.first(n_keys), old.codes.first(n_keys), old.map, n_fitted)

    def fork(self, keys: Any = None) -> "ScanIndex":
        """See `Index.fork`."""
        state = self._state
        forked = state._replace(keys=state.keys.moved(keys), codes=state.codes._replace(owner=False))
        return ScanIndex(forked, self._recipe)

    def snapshot(self) -> "ScanIndex":
        """See `Index.snapshot`."""
        return self.fork()

    def save(self, path: str | PathLike[str], with_keys: bool = True) -> None:
        """See `Index.save`."""
        keys, codes, coordinates, n_fitted = self._state
        blocks, factors = codes.trimmed()
        arrays = {"blocks": blocks, "factors": factors}
        arrays |= {f"map.{name}": array for name, array in coordinates._asdict().items()}
        asked, seed, dims = self._recipe
        if asked is not None:
            arrays["queries"] = asked
        storage.write(path, self.kind, {"seed": seed, "dims": dims, "n_fitted": n_fitted}, arrays, keys, with_keys)

    @classmethod
    def restore(cls, saved: storage.Saved) -> "ScanIndex":
        arrays, settings = saved.arrays, saved.settings
        coordinates = Map(*(arrays[f"map.{name}"] for name in Map._fields))
        codes = Codes(arrays["blocks"], arrays["factors"], saved.keys.shape[1], True)
        recipe = Recipe(arrays.get("queries"), settings["seed"], settings["dims"])
        return cls(State(saved.keys, codes, coordinates, settings["n_fitted"]), recipe)


def encoded(keys: Keys, recipe: Recipe, steps: Steps) -> State:
    """All keys in coordinates chosen from them."""
    n_heads, n_keys, _ = keys.shape
    steps.reached(0.0)
    coordinates = fit(keys, *recipe)
    codes = Codes.empty(n_heads, coordinates.keys.shape[1], n_keys)
    for head in range(n_heads):
        steps.reached((head + 1) / (n_heads + 1))
        extend(codes, keys, coordinates, head)
    steps.reached(1.0)
    return State(keys, codes._replace(n_keys=n_keys), coordinates, n_keys)


def thinned(queries: Array, n_heads: int) -> Array:
    """At most N_KEPT of the queries (H, T, D) of each KV head, evenly spread: (G, n, D)."""
    rows = queries.reshape(n_heads, -1, queries.shape[2])
    chosen = np.linspace(0, rows.shape[1] - 1, min(rows.shape[1], N_KEPT)).astype(np.int64)
    return np.ascontiguousarray(rows[:, chosen])


def default_effort(k: int) -> int:
    """Keys scored exactly for k found."""
    return 4 * k + 56
