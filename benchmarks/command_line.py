"""The parser of a benchmark's command line."""

import argparse


def make_parser(name: str, words: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring as it is.

    Args:
        name: The module in ``benchmarks``.
        words: Its docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
