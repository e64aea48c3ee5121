"""Pruning within a budget: which operators stay dense so that the loss stays acceptable."""
