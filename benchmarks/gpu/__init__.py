"""Speed of the kernels and of decoding on a GPU."""
