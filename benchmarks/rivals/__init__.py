"""Published methods, measured with their own code."""
