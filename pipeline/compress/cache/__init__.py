"""A smaller KV cache: what keys and values are mapped to, and in how many bits that is kept."""
