"""The figures of README.md, docs/ and benchmarks/README.md, written from the results."""
