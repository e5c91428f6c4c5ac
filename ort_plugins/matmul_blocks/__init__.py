"""MatMulBlocks: products of rows of numbers with a matrix of low-bit codes, on the CPU."""
