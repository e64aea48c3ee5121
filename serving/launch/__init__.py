"""Starting vLLM's server on a checkpoint."""
