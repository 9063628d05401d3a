"""The part of the library that knows Lightning: the callback, the DataModule, and the parts between them.

Nothing outside this folder imports Lightning.
"""
