"""Tiny random models whose attention is peaked, so that a wrong key changes the output."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 128

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    # A window wider than any text, as published ones have; transformers calls all layers sliding.
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 16_384}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tiny_config(kind: str):
    _, config_class, extra = MODELS[kind]
    return config_class(**COMMON, **extra)


def tiny_model(kind: str, attention: str = "retrieval"):
    """A float32 model of the kind; the same weights every time."""
    torch.manual_seed(7)
    model = MODELS[kind][0](tiny_config(kind)).eval()
    sharpen(model)
    model.set_attn_implementation(attention)
    return model


def sharpen(model, factor: float = 20.0) -> None:
    """Scale the attention weights up: at their initial scale attention is nearly uniform, and any keys would do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "v_proj", "o_proj", "q_norm", "k_norm")):
                weight.mul_(3.0 if "norm" in name else factor)


def prompt_ids(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """A tokenizer with one token per byte and four special ones; accepts any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template)


def save_tiny_chat_model(folder, kind: str = "llama", chat_template: str | None = CHAT_TEMPLATE):
    """A tiny random model with a byte tokenizer, in the layout that `load` reads."""
    torch.manual_seed(7)
    tokenizer = byte_tokenizer(chat_template)
    model_class, config_class, extra = MODELS[kind]
    model = model_class(config_class(**(COMMON | {"vocab_size": len(tokenizer), "eos_token_id": 256} | extra)))
    sharpen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
