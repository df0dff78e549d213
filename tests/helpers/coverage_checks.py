"""What holds of every list of keys."""

import torch

from retrieval_attn.kernels import SparseIndex


def assert_named_once(index: SparseIndex, n_keys: int):
    """No key twice in a run: it would count twice."""
    _, heads, runs = index.n_blocks.shape
    for h in range(heads):
        for n in range(runs):
            starts = index.blocks[0, h, n, : index.n_blocks[0, h, n]].long()
            blocks = (starts[:, None] + torch.arange(index.width)).flatten()
            keys = torch.cat([blocks, index.columns[0, h, n, : index.n_columns[0, h, n]].long()])
            keys = keys[(keys >= 0) & (keys < n_keys)]
            assert len(keys.unique()) == len(keys)
