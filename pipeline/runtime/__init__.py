"""Run a model token by token: one interface over torch, ONNX Runtime and TensorRT."""
