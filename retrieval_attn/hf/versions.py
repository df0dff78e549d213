"""Differences between the transformers versions we serve (4.57 to 5.x), and nothing else."""

from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ALL_ATTENTION_FUNCTIONS", "AttentionMaskInterface", "causal_mask_function", "query_length", "sdpa_mask"]


def query_length(argument: Any) -> int:
    """The number of new tokens, from what `get_mask_sizes` was given: an int, before 5.4 a `cache_position`."""
    return int(argument.shape[0]) if isinstance(argument, torch.Tensor) else int(argument)
