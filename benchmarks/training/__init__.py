"""Do harder batches make better models, and when? See ``python -m benchmarks.training --help``."""
