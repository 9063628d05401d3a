"""The part of the library that knows Lightning: the callback, the DataModule, and what stands between them.

Nothing outside this folder imports Lightning.
"""
