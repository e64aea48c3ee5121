"""Pruning one decoder layer after another."""
