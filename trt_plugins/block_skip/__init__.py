"""Block-skip linear layer: its specification in NumPy."""
