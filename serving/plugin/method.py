"""What is refused under vLLM, said in the same words by the launcher and the plugin."""

from __future__ import annotations

LORA_REFUSED = (
    "--enable-lora is not served with 2:4 weights, because vLLM's LoRA layers read dense ones: "
    "export the checkpoint with --format dense and serve that without --quantization"
)
