"""How hard the batches of each composer are, and what they cost. See ``python -m benchmarks.composers --help``."""
