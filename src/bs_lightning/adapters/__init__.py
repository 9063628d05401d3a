"""Adapters: composed batches in the trainers of other libraries."""
