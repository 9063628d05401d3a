"""How much longer `import bs_lightning` takes than `import lightning`, each in new processes, in turn.

python -m benchmarks.import_time
"""

import statistics
import subprocess
import sys

from .command_line import make_parser

PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(package: str) -> float:
    """Return how long a new process takes to import a package."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(package)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Print the medians over the repeats."""
    parser = make_parser("import_time", __doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of processes")
    repeats = parser.parse_args().repeats
    # The first pair fills the disk cache.
    pairs = [(seconds("lightning"), seconds("bs_lightning")) for _ in range(repeats + 1)][1:]
    theirs, ours = (statistics.median(values) for values in zip(*pairs, strict=True))
    difference = statistics.median(b - a for a, b in pairs)
    print("| `import lightning`, s | `import bs_lightning`, s | difference, s |\n|---|---|---|")
    print(f"| {theirs:.2f} | {ours:.2f} | {difference:.2f} |")


if __name__ == "__main__":
    main()
