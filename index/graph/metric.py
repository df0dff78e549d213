"""How alike two keys are to the queries that were sampled.

Keys are near when these queries score them alike, so distances are taken where a direction counts as much as the
queries use it: a direction in which keys differ most, but which no query asks about, tells nothing.
"""

from typing import NamedTuple

import numpy as np

from retrieval_attn.arrays import Array

# What a direction counts at least, as a share of the one that counts most.
FLOOR = 0.05


class Metric(NamedTuple):
    """A map of keys to points whose squared distance is the mean squared difference of the keys' scores.

    mean: (E,) float32, of the keys. axes: (E, E) float32.
    """

    mean: Array
    axes: Array

    def points(self, keys: Array) -> Array:
        """keys (n, E) float32 as points (n, E) float32."""
        return np.ascontiguousarray((keys - self.mean) @ self.axes)


def fit_metric(keys: Array, queries: Array) -> Metric:
    """The metric of queries (n, E), each at length 1, for keys (S, E); float32."""
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    unit = queries / np.maximum(lengths, np.finfo(np.float32).tiny)
    values, vectors = np.linalg.eigh((unit.T @ unit / len(unit)).astype(np.float64))
    # A floor keeps keys apart in directions that these queries happen not to use, and later ones may. Lower, queries
    # like the sampled ones find slightly more; but those of a text that has drifted away find far less.
    values = np.maximum(values, max(FLOOR * values.max(), np.finfo(np.float32).tiny))
    return Metric(
        keys.mean(axis=0, dtype=np.float64).astype(np.float32), (vectors * np.sqrt(values)).astype(np.float32)
    )
