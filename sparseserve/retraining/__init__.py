"""Training the kept weights of a pruned model, masks fixed."""
