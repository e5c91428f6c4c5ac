"""Quantised weights: arrays in, arrays out."""
