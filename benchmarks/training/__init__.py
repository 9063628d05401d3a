"""Do harder batches help a trained model, and when? See ``python -m benchmarks.training --help``."""
