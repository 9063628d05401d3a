"""The part of the library that knows Lightning: the callback, the DataModule, and the parts between them.

Outside this folder, only ``presets`` and ``recipes`` use Lightning.
"""
