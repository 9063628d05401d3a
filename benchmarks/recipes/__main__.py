"""The recipes on the paper's data: train and measure the arms, and print them beside the paper's figures.

    python -m benchmarks.recipes graphs --data-dir DIR --datasets MUTAG --model graphcl \\
        --arms fixed uniform knn batchsampler untrained --seeds 5 --results results.csv
    python -m benchmarks.recipes language --data-dir DIR --model simcse \\
        --arms uniform knn batchsampler --seeds 3 --results results.csv
    python -m benchmarks.recipes vision --data-dir DIR --dataset cifar10 --model simclr \\
        --arms uniform knn batchsampler --seeds 3 --results results.csv
    python -m benchmarks.recipes results

A benchmark adds a row to the results file for each finished run. It skips the runs that the file already holds, so you
can resume an interrupted benchmark. Only one process at a time may write to a file. `results` makes docs/results.md
from the files in benchmarks/recipes/results.
"""

import argparse

from ..command_line import make_parser
from . import graphs, language, page, vision


def main() -> None:
    """Run the command that was asked for."""
    parser = make_parser("recipes", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {"graphs": graphs, "language": language, "vision": vision, "results": page}
    for name, module in modules.items():
        command = commands.add_parser(
            name, help=str(module.__doc__).splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args()
    args.main(args)


if __name__ == "__main__":
    main()
