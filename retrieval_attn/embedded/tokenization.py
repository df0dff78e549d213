"""The stock fast tokenizer, for loading with trust_remote_code; see tokenizer_config.json."""

from transformers import PreTrainedTokenizerFast

__all__ = ["PreTrainedTokenizerFast"]
