"""Tensors in, tensors out: factors of a matrix, in every form, rounded or not."""
