"""What onnxruntime-genai needs to know of the graph (https://onnxruntime.ai/docs/genai)."""

from __future__ import annotations

from transformers import PreTrainedModel

from sparseserve.exporters.onnx.graph import GRAPH_FILE
from sparseserve.text import position_limit

_LONGEST = 2048  # tokens, of a model that names no limit


def genai_config(model: PreTrainedModel) -> dict[str, object]:
    """Return the contents of ``genai_config.json``: greedy decoding on the CPU, unless told."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    longest = position_limit(config) or _LONGEST
    ends = model.generation_config.eos_token_id if model.generation_config else None
    decoder: dict[str, object] = {
        "session_options": {"provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": getattr(config, "head_dim", None) or int(config.hidden_size) // heads,
        "hidden_size": int(config.hidden_size),
        "num_attention_heads": heads,
        "num_hidden_layers": int(config.num_hidden_layers),
        "num_key_value_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    tokens = {
        name: token
        for name, token in (
            ("bos_token_id", config.bos_token_id),
            ("eos_token_id", ends if ends is not None else config.eos_token_id),
            ("pad_token_id", config.pad_token_id),
        )
        if token is not None
    }
    return {
        "model": {
            **tokens,
            "context_length": longest,
            "decoder": decoder,
            "type": "decoder",  # any language model with inputs and outputs of these kinds
            "vocab_size": int(config.vocab_size),
        },
        "search": {
            "do_sample": False,
            "max_length": longest,
            # The graph returns longer keys and values than it was given.
            "past_present_share_buffer": False,
        },
    }
