"""Perplexity, KL and accuracy against bytes and parameters."""
