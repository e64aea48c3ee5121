"""Perplexity of a model or a checkpoint on text it was not calibrated with."""
