"""Convolutions in 8 bits and fewer: ranges, rounding, training under rounding; knows no task."""
