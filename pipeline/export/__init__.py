"""One ONNX graph for prefill and decode, with block-skip nodes that carry their own body."""
