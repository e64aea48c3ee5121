"""Prune language models to 2:4 sparsity, export them and serve them."""
