"""Random bonuses that turn the search for the best keys into a weighted sample of all keys.

SoftmaxLift ("Attention via Black-Box Vector Search", Zharkov, Singal, Padaki, Andoni, 2026): draw u uniform on (0, 1]
for every key, once, and rank keys by <q, k> + g with g = -ln(u) / scale. Then scale * (<q, k> + g) = ln(w / u) with
w = exp(scale <q, k>), a priority: the K keys of highest priority are a sample in which a key's chance follows its
softmax weight. The bonus acts as one more coordinate of the key, at which every query has 1.
"""

import numpy as np

from retrieval_attn.arrays import Array

# Multipliers of the SplitMix64 generator.
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Lift:
    """The bonuses of one layer's keys.

    Those of a key depend on seed, head and id alone, so no file holds them; in memory they take 4 bytes a key.
    scale: what scores are multiplied with inside the softmax, in attention usually D ** -0.5.
    """

    def __init__(self, scale: float, seed: int, n_heads: int) -> None:
        if not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"lift must be positive (the softmax scale, usually D ** -0.5), got {scale}")
        self.scale = float(scale)
        self.seed = int(seed)
        # Longer than the keys, so that keys appended one by one do not draw them all again.
        self._drawn: Array = np.empty((n_heads, 0), np.float32)

    def bonuses(self, n_keys: int) -> Array:
        """Bonuses (G, n) float32 with n >= n_keys, C-contiguous; column i belongs to key i. Safe from many threads."""
        drawn = self._drawn
        if drawn.shape[1] < n_keys:
            drawn = draw(self.seed, len(drawn), n_keys + n_keys // 4 + 64) / np.float32(self.scale)
            self._drawn = drawn
        return drawn


def draw(seed: int, n_heads: int, n_keys: int) -> Array:
    """Standard exponential numbers (G, n) float32, each a function of seed, head and key id alone."""
    heads = np.arange(n_heads, dtype=np.uint64)[:, None] + np.uint64(1)
    keys = np.arange(n_keys, dtype=np.uint64)[None]
    start = _mixed(heads * _GOLDEN + np.uint64(seed % 2**63))
    bits = _mixed(start + (keys + np.uint64(1)) * _GOLDEN)
    # 53 random bits, moved to (0, 1]: zero would be an infinite bonus.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    return (-np.log(uniform)).astype(np.float32)


def _mixed(x: Array) -> Array:
    """SplitMix64: a permutation of 64 bits without visible structure."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
