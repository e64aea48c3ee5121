"""Pruning decoder layers on many machines at once."""
