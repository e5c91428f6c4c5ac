"""Bundles: an engine with the program that runs it on a board, and the proof that it still does."""
