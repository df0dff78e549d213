"""Tiny GGUF files: a random Llama with a byte tokenizer and a chat template, its matrices in blocks of 8 bits."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import CHAT_TEMPLATE, MODELS, byte_tokenizer, sharpen, tiny_config
from torch import Tensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    without: str = "",
    rope_freqs: Any = None,
    per_part: int = 0,
    fields_apart: bool = False,
    **fields: Any,
) -> Path:
    """Write the file. without: the name of a tensor to leave out. rope_freqs: what to divide frequencies by.

    per_part: how many tensors a part holds, if there are to be parts. fields_apart: the first holds none.
    fields: more, or others, "__" standing for a dot.
    """
    tokenizer = byte_tokenizer()
    config = tiny_config("llama")
    config.vocab_size = len(tokenizer)
    model = MODELS["llama"][0](config)
    sharpen(model)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_part, small_first_shard=fields_apart)
    _write_fields(writer, config, tokenizer)
    for name, value in fields.items():
        write: Any = {str: writer.add_string, float: writer.add_float32}.get(type(value), writer.add_uint32)
        write(name.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        stored = _renamed(name)
        if stored != without:
            _write_tensor(writer, stored, _permuted(name, weight, config))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_fields(writer: gguf.GGUFWriter, config: Any, tokenizer: Any) -> None:
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word.startswith("<|") else 1 for word in words])
    # No word is made of two others, so that no merges follow from scores.
    writer.add_token_scores([0.0] * len(words))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _renamed(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _permuted(name: str, weight: Tensor, config: Any) -> Tensor:
    """llama.cpp pairs the dimensions that rotate together side by side, transformers half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n_heads = next((n for kind, n in heads.items() if kind in name), None)
    if n_heads is None:
        return weight
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    values = weight.detach().float().numpy()
    if values.ndim < 2:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
