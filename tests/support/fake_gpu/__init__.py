"""A GPU out of this machine's memory: CUDA's driver and TensorRT as their users see them."""
