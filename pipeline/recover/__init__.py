"""Recovery: fine-tune the factors of a compressed checkpoint; same ranks, same size."""
