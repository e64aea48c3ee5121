"""Which of the families that transformers knows can be pruned, exported and served."""
