"""Serving 2:4 checkpoints with vLLM, and measuring what is served (docs/serving.md, docs/speed.md)."""
