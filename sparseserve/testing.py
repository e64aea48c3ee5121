"""Tiny seeded models of real architectures, for tests, smoke runs and third parties' own tests.

They are built from their configuration and never downloaded. Every ``in_features`` is a multiple
of 8 and every head is 32 wide, so the models can be packed as 2:4 and served.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_BYTES = 256
# The next multiple of 8 after 256 bytes and the special tokens.
TINY_VOCABULARY = 264

_COMMON: dict[str, object] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": _BYTES,
    "bos_token_id": _BYTES + 1,
    "eos_token_id": _BYTES + 2,
    # Large enough for every layer to change the hidden states by about their own size.
    "initializer_range": 0.1,
}
_GATED = {**_COMMON, "num_key_value_heads": 1, "intermediate_size": 128}
# Windows shorter than the tests' sequences, so that local attention differs from global.
_ALTERNATING = {
    **_GATED,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
}

# Settings of each family's configuration, by the name transformers gives the family.
TINY_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {**_GATED, "tie_word_embeddings": False},
    "opt": {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1},
    "qwen2": {**_GATED, "tie_word_embeddings": True},
    "qwen3": {**_GATED, "head_dim": 32},
    "mistral": {**_GATED, "head_dim": 32, "sliding_window": 8},
    "gemma2": {
        **_ALTERNATING,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3_text": {
        **_ALTERNATING,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "phi3": {**_GATED},
    "gpt2": {**_COMMON, "n_inner": 128},
    "gpt_neox": {**_COMMON, "intermediate_size": 128},
}


_MAMBA = {
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
#: Families that need more of what stands around pruning. vLLM runs some by its Transformers
#: backend, some have Mamba mixers, and some have other names on disk than in memory.
MORE_TINY_FAMILIES: dict[str, dict[str, object]] = {
    "smollm3": {**_GATED, "tie_word_embeddings": True, "no_rope_layer_interval": 2},
    "falcon_h1": {**_GATED, **_MAMBA, "head_dim": 32, "mamba_d_ssm": 64, "mamba_n_heads": 2},
    "granitemoehybrid": {
        **_GATED,
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
    },
    "nemotron_h": {
        **_GATED,
        "head_dim": 32,
        "hybrid_override_pattern": "M*-M",
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "gemma3": {
        "text_config": {
            **_ALTERNATING,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": TINY_VOCABULARY - 1,
        "boi_token_index": TINY_VOCABULARY - 2,
        "eoi_token_index": TINY_VOCABULARY - 3,
    },
}


#: Families whose layers are handed more than hidden states: keys and values of earlier layers, and
#: embeddings of their own. Those of the first have several streams of hidden states, too.
HANDING_TINY_FAMILIES: dict[str, dict[str, object]] = {
    "gemma3n_text": {
        **_ALTERNATING,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": TINY_VOCABULARY,
        "altup_num_inputs": 2,
        "laurel_rank": 16,
    },
    "gemma4_text": {
        **_ALTERNATING,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": TINY_VOCABULARY,
    },
}

_ROUTED = {
    **_GATED,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
#: Mixtures of experts. The files of ``gpt_oss`` and ``llama4_text`` have all experts of a layer in
#: one tensor, each in its own layout; those of the others have a tensor for each expert.
EXPERT_TINY_FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": {**_ROUTED, "num_local_experts": 4},
    "qwen3_moe": {**_ROUTED, "num_experts": 4, "head_dim": 32},
    "gpt_oss": {
        **_ROUTED,
        "num_local_experts": 4,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Its latent attention is as wide as vLLM can compute it.
    "deepseek_v3": {
        **_ROUTED,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "olmoe": {**_ROUTED, "num_experts": 4},
    "llama4_text": {
        **_ROUTED,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 32,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 128,
    },
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model of a ``family`` of the tables above, ready to run.

    Biases and norm weights are drawn too, so that a test sees when one is dropped.
    """
    tables = (TINY_FAMILIES, MORE_TINY_FAMILIES, HANDING_TINY_FAMILIES, EXPERT_TINY_FAMILIES)
    settings = next(table[family] for table in tables if family in table)
    config = AutoConfig.for_model(family, **settings)
    # The generator is forked: building a model does not disturb the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token for each byte, and the special tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: token for token, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    pad, start, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def save_tiny_model(
    family: str, path: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Save :func:`tiny_model` and its tokenizer under ``path`` and return it."""
    tiny_model(family, seed).to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
