"""TensorRT engines, built in a subprocess, with a manifest of what was really built."""
