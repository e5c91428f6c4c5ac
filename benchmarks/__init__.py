"""What was measured, and how: every figure of the documentation comes from a command here."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
