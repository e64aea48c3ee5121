"""Opening packed24 checkpoints with plain transformers; ``autoload`` says how it comes to that."""
