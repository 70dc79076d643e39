"""Tables of README.md and benchmarks/README.md, by subject."""
