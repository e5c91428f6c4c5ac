"""Find and load the model that is to be compressed, and read its structure."""
