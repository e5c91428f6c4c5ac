"""Low-rank factorisation: pure mathematics, then its life cycle on a whole model."""
