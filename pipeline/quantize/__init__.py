"""Weights of few bits: arrays in, arrays out."""
