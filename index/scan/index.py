"""Every key, every time, but through a sixth of its bytes or less: 4-bit codes, then exact scores of the best.

A key's code is made when the key arrives, from that key alone, in coordinates chosen from the first keys; once there
are half as many again, the coordinates are chosen anew, and all keys encoded again. Codes are scanned about as fast
as memory can be read. There is no second level of codes between these and the keys: after 4 bits a few hundred keys
remain, and scoring them exactly takes about a sixth of the time.
"""

from os import PathLike
from typing import Any, NamedTuple, Self

import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.index import storage
from retrieval_attn.index.exact import scan_all
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.over_keys import OverKeys
from retrieval_attn.index.protocol import SearchResult, Steps, check_effort, check_search
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


class ScanIndex(OverKeys[State]):
    """4-bit codes of all keys. Effort is the number of keys per query that are scored exactly."""

    kind = "scan"

    def __init__(self, state: State, recipe: Recipe) -> None:
        super().__init__(state)
        self._recipe = recipe

    @classmethod
    def build(cls, keys: Keys, queries: Array | None, seed: int, steps: Steps, dims: int | None = None) -> Self:
        """Choose the coordinates that tell most about the scores of `queries`, and encode the keys.

        dims: numbers of 4 bits per key, at most D; None: as many as hold 95 % of what makes scores differ (see
            scan/map.py). Without `queries` all directions count alike, and it usually takes more of them.
        """
        if dims is not None and dims < 1:
            raise ValueError(f"dims must be at least 1, got {dims}")
        state = encoded(keys, Recipe(queries, seed, dims), steps)
        return cls(state, Recipe(None if queries is None else thinned(queries, keys.shape[0]), seed, dims))

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
            return scan_all(keys, batch)
        ids, scores = search_codes(keys, codes, coordinates.queries, batch.queries, k, n_wanted)
        return batch.result(ids, scores, np.full(ids.shape[:2], n_keys, np.int64))

    def _grow(self, keys: Keys) -> None:
        """When there are half as many keys again, all are encoded anew, at once."""
        old, n_keys = self._state, keys.shape[1]
        if n_keys >= REFIT * old.n_fitted:
            self._state = encoded(keys, self._recipe, Steps())
            return
        codes = old.codes.roomy(n_keys)
        for head in range(keys.shape[0]):
            extend(codes, keys, old.map, head)
        self._state = old._replace(keys=keys, codes=codes._replace(n_keys=n_keys))

    def _shrink(self, keys: Keys) -> None:
        old, n_keys = self._state, keys.shape[1]
        # What is left of the keys that the coordinates were chosen from: others may follow.
        self._state = State(keys, old.codes.first(n_keys), old.map, min(old.n_fitted, n_keys))

    def _forked(self, state: State, keys: Keys) -> Self:
        return type(self)(state._replace(keys=keys, codes=state.codes._replace(owner=False)), self._recipe)

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
    def restore(cls, saved: storage.Saved) -> Self:
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
