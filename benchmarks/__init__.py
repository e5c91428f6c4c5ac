"""Measurements behind the claims of the documentation; none of them is a test."""
