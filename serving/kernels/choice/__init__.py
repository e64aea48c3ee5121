"""Choosing a kernel for each layer by measurement."""
