"""Attention over a cache of latents, as a TensorRT plugin."""
