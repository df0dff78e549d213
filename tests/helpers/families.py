"""The configuration of a tiny model of every type of language model that transformers registers, with images or not.

They are shrunk by the names of sizes.
"""

import inspect
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# Those that are of both kinds load as language models.
IMAGE_TYPES = [
    name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
]

TYPES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *IMAGE_TYPES]

VOCABULARY = 320

# By what a size says, the names under which configurations know it.
SIZES: dict[int, str] = {
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks depth num_attention_heads n_head n_heads num_heads attention_heads "
    "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads "
    "linear_num_heads linear_num_key_heads index_n_heads max_window_layers mamba_dt_rank",
    128: "mamba_d_ssm",
    8: "mamba_n_heads mamba_num_heads qk_rope_head_dim rotary_dim hc_lowrank",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups num_experts_per_tok moe_topk "
    "moe_k index_topk_blocks n_shared_experts num_shared_experts",
    1: "n_group topk_group zero_expert_num router_n_groups first_k_dense_replace",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size "
    "out_hidden_size text_hidden_size projector_hidden_size projection_dim image_token_embed_dim "
    "output_embedding_size attention_hidden_size lru_width sliding_window sliding_window_size attention_window_size "
    "window_size local_attention attention_chunk_size embed_dim",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "intermediate_size_mlp dense_intermediate_size dim_ff dff d_inner expert_ffn_hidden_size feed_forward_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    16: "head_dim d_head dim_head kv_channels swa_head_dim v_head_dim qk_nope_head_dim attention_head_dim "
    "attention_head_size kv_lora_rank q_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim "
    "index_head_dim index_topk index_block_size "
    "hidden_size_per_layer_input mamba_d_state ssm_state_size state_size "
    "mamba_head_dim mamba_d_head "
    "query_pre_attn_scalar chunk_size mamba_chunk_size o_lora_rank router_hidden_size laurel_rank adapter_rank",
    2048: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab unpadded_vocab_size",
}

BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "sep_token_id": 2, "cls_token_id": 1}

# What no rule of names says: sizes that must fit each other, and what makes layers of more than one kind.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_group_size": 2, "head_dim": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 96}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "initializer_range": 0.07,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [96, 48]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "1/2",
    },
    "molmo2_adapter": {"vision_feature_layer": [3, 2]},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "step3p5": {"sliding_window": 64},
    "wavtokenizer_encoder": {"codebook_dim": 64},
    "apertus1p5": {
        "image_token_id": 5,
        "audio_token_id": 6,
        "image_token_offset": 100,
        "audio_token_offset": 164,
        "vision_config": {"codebook_size": 64, "base_channels": 32},
        "audio_config": {"codebook_size": 64},
    },
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "perception_lm": {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": 64}}},
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 64},
    "muse_glimmer_text": {"qk_scale_factor": 1.5},
    "muse_spark_text": {"qk_scale_factor": 1.5},
    "muse_spark_audio": {"hidden_sizes": [32, 32, 64, 64]},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {"linear_num_key_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hrm_text": {"num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
}

for _name in ("mistral", "mixtral", "starcoder2", "phimoe", "qwen2_moe", "minimax_m2"):
    OWN[_name] = {"sliding_window": None}


def _three_axes(*sections: int) -> dict[str, Any]:
    """Positions in time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


for _name in (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "paddleocr_vl_text",
    "glm4v_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "cosmos3_edge_text",
    "glm46v_text",
):
    OWN[_name] = OWN.get(_name, {}) | _three_axes(2, 3, 3)

OWN["ernie4_5_vl_moe_text"] |= _three_axes(3, 3, 2)
OWN["glm4v_moe_text"] = _three_axes(1, 1, 2)

# Refused by their configuration, which may say what it likes: nothing is ever made of it.
NOT_SHRUNK: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {},
    "dots3_note": {},
    "florence2": {},
    "glm5_next": {},
    "hy_v4_vl": {},
    "inkling2": {},
    "inkling2_loop": {},
    "dots3_note_text": {},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
}


def tiny(model_type: str, **own: Any) -> Any:
    """The configuration of a tiny model of this type; `own` goes before all rules."""
    if model_type in NOT_SHRUNK:
        return CONFIG_MAPPING[model_type](**NOT_SHRUNK[model_type])
    return _shrunk(CONFIG_MAPPING[model_type], OWN.get(model_type, {}) | own)


def _shrunk(config_class: Any, own: dict[str, Any]) -> Any:
    known = inspect.signature(config_class.__init__).parameters
    sizes = {name: size for name, size in BY_NAME.items() if _is_size(known, name)}
    ids = {name: value for name, value in SPECIAL.items() if name in known}
    parts = {name: _part(config_class, name, own.get(name)) for name in getattr(config_class, "sub_configs", {})}
    given = sizes | ids | own | {name: part for name, part in parts.items() if part is not None}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        given["num_key_value_heads"] = given["num_attention_heads"]
    config = config_class(**given)
    kinds = list(dict.fromkeys(_layer_kinds(config_class)))
    if "layer_types" in known and "layer_types" not in own and set(kinds) - set(config.layer_types or ()):
        config = config_class(**given, layer_types=(kinds * 4)[: max(4, len(kinds))])
    return config


def _layer_kinds(config_class: Any) -> list[str]:
    """The kinds of layers that a model of the usual size has, in order."""
    try:
        return getattr(config_class(), "layer_types", None) or []
    except Exception:
        return []


def _part(config_class: Any, name: str, own: Any) -> Any:
    part = config_class.sub_configs[name]
    if name not in inspect.signature(config_class.__init__).parameters:
        return None
    if own and "model_type" in own:
        return _shrunk(CONFIG_MAPPING[own["model_type"]], own)
    if not hasattr(part, "sub_configs") or "Auto" in part.__name__:
        default = getattr(config_class(), name, None)
        part = type(default) if default is not None else None
    return None if part is None else _shrunk(part, OWN.get(part.model_type, {}) | (own or {}))


def _is_size(known: Any, name: str) -> bool:
    """Whether the class has this size, and a number is its default or may be."""
    return name in known and (known[name].default is not None or "window" not in name)
