"""The name vLLM knows us by, and what we tell it that we cannot do."""

from __future__ import annotations

#: Of the quantization method, and of the plugin.
METHOD_NAME = "sparseserve"

LORA_REFUSED = (
    "--enable-lora is not served with 2:4 weights, because vLLM's LoRA layers read dense ones: "
    "export the checkpoint with --format dense and serve that without --quantization"
)
