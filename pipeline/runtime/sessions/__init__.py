"""One session for each backend, and what opens them."""
