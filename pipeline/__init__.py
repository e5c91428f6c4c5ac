"""Compress a Hugging Face decoder, export it to ONNX, build a TensorRT engine, prove each step."""

__version__ = "0.1.0"
