"""Measurements of bs-lightning. Start each from the repository's root with ``python -m benchmarks.NAME --help``."""
