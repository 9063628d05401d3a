"""The recipes on the paper's data, by the paper's protocol. See ``python -m benchmarks.recipes --help``."""
