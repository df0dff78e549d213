"""Keys as 4-bit codes, with one factor per key; they grow in place, and views taken earlier stay valid.

A coordinate x of a key (see map.py) is stored as the number c in 0..15 for which factor * (c - 7.5) is nearest;
the factor is the key's own, so that its largest coordinate just fits.
"""

from typing import NamedTuple

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index.keys import HeadKeys, Keys
from retrieval_attn.index.loops.dots import dots_4x4
from retrieval_attn.index.scan.dots import GROUP_BYTES, GROUP_DIMS, LANES
from retrieval_attn.index.scan.map import Map

# Keys that one thread encodes at a time.
CHUNK = 1024

# The factor, in bfloat16 bits, of a key whose coordinates overflow: its estimate is no number and passes every floor.
NOT_A_NUMBER = 0x7FC0

# Room for new keys, as a share of those there are: copying then costs a constant time per appended key.
ROOM = 0.25


class Codes(NamedTuple):
    """Codes of the first n_keys keys of each head; what stands behind them is not looked at.

    blocks: (G, n, bytes per block) uint8, n >= n_keys / 16, laid out as dots.py reads them.
    factors: (G, 16 n) uint16, bfloat16 bits.
    owner: whether nobody else reads or writes behind n_keys, so that new keys may go there.
    """

    blocks: Array
    factors: Array
    n_keys: int
    owner: bool

    @property
    def nbytes(self) -> int:
        return int(self.blocks.nbytes + self.factors.nbytes)

    @classmethod
    def empty(cls, n_heads: int, dims: int, n_keys: int) -> "Codes":
        """No codes, with room for n_keys."""
        n_blocks = -(-n_keys // LANES)
        blocks = np.zeros((n_heads, n_blocks, dims // GROUP_DIMS * GROUP_BYTES), np.uint8)
        return cls(blocks, np.zeros((n_heads, n_blocks * LANES), np.uint16), 0, True)

    def first(self, n_keys: int) -> "Codes":
        """The first n_keys of these. What grows from here leaves the codes that older objects read alone."""
        return self._replace(n_keys=n_keys, owner=False)

    def roomy(self, n_keys: int) -> "Codes":
        """The same codes where n_keys fit."""
        if self.owner and self.factors.shape[1] >= n_keys:
            return self
        n_heads, _, size = self.blocks.shape
        grown = Codes.empty(n_heads, size // GROUP_BYTES * GROUP_DIMS, n_keys + int(ROOM * n_keys))
        used = -(-self.n_keys // LANES)
        grown.blocks[:, :used] = self.blocks[:, :used]
        grown.factors[:, : used * LANES] = self.factors[:, : used * LANES]
        return grown._replace(n_keys=self.n_keys)

    def trimmed(self) -> tuple[Array, Array]:
        """Copies of blocks and factors, with zeros behind the last key, where another thread may be writing."""
        used, n_last = -(-self.n_keys // LANES), self.n_keys % LANES
        blocks, factors = self.blocks[:, :used].copy(), self.factors[:, : used * LANES].copy()
        if n_last:
            blocks[:, -1].reshape(len(blocks), -1, LANES, GROUP_BYTES // LANES)[:, :, n_last:] = 0
            factors[:, self.n_keys :] = 0
        return blocks, factors


def extend(codes: Codes, keys: Keys, coordinates: Map, head: int) -> None:
    """Write the codes of those keys of one head that `codes` does not hold yet; there is room for them."""
    first, last = codes.n_keys, keys.shape[1]
    axes, written = (coordinates.keys[head], coordinates.offsets[head]), (codes.blocks[head], codes.factors[head])
    write = encode if last - first < CHUNK else encode_parallel
    write(keys.of_head(head), *axes, *written, first, last)


@jit(parallel=True)
def encode_parallel(
    keys: HeadKeys, projection: Array, offset: Array, blocks: Array, factors: Array, first: int, last: int
) -> None:
    for chunk in numba.prange((last - first + CHUNK - 1) // CHUNK):
        start = first + chunk * CHUNK
        encode(keys, projection, offset, blocks, factors, start, min(start + CHUNK, last))


@jit()
def encode(
    keys: HeadKeys, projection: Array, offset: Array, blocks: Array, factors: Array, first: int, last: int
) -> None:
    """Codes of the keys first..last; each is the same whatever the keys beside it."""
    values, base, stride, _ = keys
    dims = len(offset)
    coordinates = np.empty((dims, 4), np.float32)
    largest = np.empty(4, np.float32)
    bits = largest.view(np.uint32)
    for quad in range(first, last, 4):
        # The last keys are too few for a quad: each is then done by one of its own, four times over.
        whole = quad + 4 <= last
        for start in range(quad, quad + 4 if whole else last, 4 if whole else 1):
            for d in range(0, dims, 4):
                dots_4x4(
                    values, base + start * stride, stride if whole else 0, projection, d, coordinates[d : d + 4], 0
                )
            largest[:] = 0
            for d in range(dims):
                for j in range(4):
                    coordinates[d, j] -= offset[d]
                    largest[j] = max(largest[j], abs(coordinates[d, j]))
            largest /= np.float32(7.5)
            for j in range(4 if whole else 1):
                finite = largest[j] < np.finfo(np.float32).max
                factor = (bits[j] + np.uint32(0x8000)) >> np.uint32(16) if finite else np.uint32(NOT_A_NUMBER)
                factors[start + j] = factor
                bits[j] = factor << np.uint32(16)
                pack(coordinates[:, j], largest[j], blocks[(start + j) // LANES], (start + j) % LANES)


@jit()
def pack(coordinates: Array, factor: float, block: Array, lane: int) -> None:
    """Write one key's codes into its lane of the block."""
    scale = 1 / factor if factor > 0 else np.float32(0)
    for byte in range(len(coordinates) // 2):
        group, i = byte // 4, byte % 4
        low = quantise(coordinates[GROUP_DIMS * group + i] * scale)
        high = quantise(coordinates[GROUP_DIMS * group + 4 + i] * scale)
        block[GROUP_BYTES * group + 4 * lane + i] = low | high << 4


@jit(inline="always")
def quantise(x: float) -> int:
    """The code of x, given in units of the factor."""
    return min(max(int(np.floor(x)) + 8, 0), 15)
