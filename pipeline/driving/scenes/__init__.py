"""Driving scenes drawn by seed, with exact labels: a set that anyone can make again."""
