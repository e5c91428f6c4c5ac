"""The block-skip kernels of `trt_plugins/block_skip` as a PyTorch operator."""
