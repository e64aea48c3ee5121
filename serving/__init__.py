"""Serving 2:4 checkpoints with vLLM, and measuring it (docs/serving.md, docs/speed.md)."""
