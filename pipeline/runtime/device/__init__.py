"""Engines on the GPU of a board without torch: CUDA's driver by ctypes, TensorRT and numpy."""
