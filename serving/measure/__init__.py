"""Measuring engines and servers: latency, load, memory, perplexity."""
