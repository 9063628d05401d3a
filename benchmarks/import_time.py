"""What `import bs_lightning` costs more than `import lightning`, in fresh processes, one after the other in turn.

python benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys

PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(package):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(package)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    # The first pair warms up the disk.
    pairs = [(seconds("lightning"), seconds("bs_lightning")) for _ in range(repeats + 1)][1:]
    theirs, ours = (statistics.median(values) for values in zip(*pairs, strict=True))
    difference = statistics.median(b - a for a, b in pairs)
    print("| `import lightning`, s | `import bs_lightning`, s | difference, s |\n|---|---|---|")
    print(f"| {theirs:.2f} | {ours:.2f} | {difference:.2f} |")


if __name__ == "__main__":
    main()
