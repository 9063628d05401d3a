"""The tests. They are a package, so that `python -m benchmarks.stress` can import the parts that both use."""
