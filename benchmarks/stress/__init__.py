"""Stress: random calls of the pure functions, and random training runs that are killed and resumed."""
