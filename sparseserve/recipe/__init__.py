"""Recipes: everything that decides what a pruning run computes."""
