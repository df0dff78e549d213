"""What 4-bit codes stand for."""

import numpy as np

from retrieval_attn.arrays import as_float32


def decoded(codes, head):
    """(S, m) float32 that the codes stand for, by the layout's definition."""
    blocks, factors = codes.trimmed()
    quads = blocks[head].reshape(len(blocks[head]), -1, 16, 4)
    numbers = np.concatenate([quads & 15, quads >> 4], axis=3).transpose(0, 2, 1, 3)
    rows = numbers.reshape(len(factors[head]), -1).astype(np.float32) - 7.5
    return (rows * as_float32(factors[head])[:, None])[: codes.n_keys]
