"""Try to break the library, and count the failures by kind.

    python -m benchmarks.stress pure --cases 300
    python -m benchmarks.stress fits --cycles 100

``pure`` calls functions that need no Trainer, with random arguments. ``fits`` trains with random settings, kills the
runs and resumes them. The exit status is 1 if there was a failure.
"""

import os
import sys

from benchmarks.command_line import make_parser
from benchmarks.stress import fits, pure


def main() -> int:
    """Run one of the harnesses and return the exit status."""
    parser = make_parser("stress", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pure", help="random calls of the pure functions")
    command.add_argument("--cases", type=int, default=300, help="cases for each function")
    command = commands.add_parser("fits", help="random training runs, killed and resumed")
    command.add_argument("--cycles", type=int, default=100, help="kills")
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases")
        command.add_argument("--seconds", type=float, default=3600, help="begin nothing new after this time")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny, and threads that wait for each other are slow
    if arguments.command == "pure":
        return pure.main(arguments.cases, arguments.seed, arguments.seconds)
    return fits.main(arguments.cycles, arguments.seed, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
