"""Time, memory and disk of every stage."""
