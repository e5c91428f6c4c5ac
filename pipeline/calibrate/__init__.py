"""Calibration text, and the second moments of what each linear layer sees."""
