"""Tiny configurations of every language model that transformers knows, from its own defaults.

A configuration keeps the default of its class for everything but sizes, and has each kind of layer
once. What a family needs besides, because its sizes depend on each other, stands in OWN.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from sparseserve.testing import TINY_VOCABULARY

VALUES: dict[int, tuple[str, ...]] = {
    64: (
        *("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "model_dim"),
        *("embed_dim", "n_embed", "word_embed_proj_dim", "conv_dim", "lru_width"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        "moe_shared_expert_intermediate_size",
    ),
    128: (
        *("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"),
        *("ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "block_ff_dim"),
        *("mamba_d_ssm", "attention_chunk_size"),
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        *("encoder_layers", "num_decoder_layers", "num_encoder_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
        *("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"),
        *("linear_num_key_heads", "index_n_heads", "altup_num_inputs"),
    ),
    1: (
        *("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_group", "topk_group"),
        *("first_k_dense_replace", "n_shared_experts", "num_shared_experts"),
        *("moe_num_shared_experts", "num_dense_layers", "mamba_n_groups", "n_groups"),
        "mamba_ngroups",
    ),
    4: (
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"),
        "mamba_d_conv",
    ),
    32: (
        *("head_dim", "d_kv", "kv_channels", "attention_head_dim", "v_head_dim", "qk_head_dim"),
        *("q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
        *("linear_head_dim", "index_head_dim", "hidden_size_per_layer_input"),
        "query_pre_attn_scalar",
    ),
    16: (
        *("qk_nope_head_dim", "qk_rope_head_dim", "mamba_d_state", "mamba_chunk_size"),
        *("ssm_state_size", "state_size", "chunk_size", "linear_key_head_dim"),
        *("linear_value_head_dim", "sliding_window", "rotary_dim", "laurel_rank"),
    ),
    8: ("mamba_dt_rank", "time_step_rank", "index_topk"),
    256: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "pad_token_id"),
    257: ("bos_token_id",),
    258: ("eos_token_id",),
    TINY_VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
}
SIZES: dict[str, object] = {key: value for value, keys in VALUES.items() for key in keys}
# Larger than usual, so that every layer changes the hidden states.
SIZES["initializer_range"] = 0.1
# Where these are None, they follow from others.
MAY_BE_NONE = {"num_key_value_heads", "head_dim", "pad_token_id", "q_lora_rank", "sliding_window"}
# Positions in time, height and width, in parts that add up to half a head.
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
PARTS = ("text_config", "vision_config", "audio_config", "decoder", "encoder")

_LATENT = {"head_dim": 16, "num_key_value_heads": 2}
_POSITIONS_AFTER_PADDING = {"pad_token_id": 1}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash"),
            "youtu",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            *("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm"),
            *("xlm-roberta", "xlm-roberta-xl"),
        ),
        _POSITIONS_AFTER_PADDING,
    ),
    **{key: {"head_dim": 32} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "diffllama": {"num_key_value_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 1},
    "qwen2_vl": {"text_config": {"rope_parameters": _ROTARY}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _ROTARY}},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_configuration(family: str) -> PretrainedConfig:
    """Return a configuration of ``family`` with tiny sizes.

    Raises:
        Exception: Whatever its class raises where the sizes do not fit together.
    """
    defaults = CONFIG_MAPPING[family]().to_dict()
    own = dict(OWN.get(family, {}))
    settings = _sizes(defaults)
    for part in PARTS:
        if isinstance(inner := defaults.get(part), dict):
            named = {"model_type": inner["model_type"]} if "model_type" in inner else {}
            settings[part] = {**_sizes(inner), **named, **own.pop(part, {})}
    if kinds := list(dict.fromkeys(defaults.get("layer_types") or ())):
        settings["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        settings["num_hidden_layers"] = len(settings["layer_types"])
    return AutoConfig.for_model(family, **{**settings, **own})


def _sizes(defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in SIZES.items()
        if key in defaults and not (defaults[key] is None and key in MAY_BE_NONE)
    }
