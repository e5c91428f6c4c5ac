"""Models larger than memory: layers that are read from disk for every call."""
