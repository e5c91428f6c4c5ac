"""Speed and memory on a CPU, beside other engines."""
