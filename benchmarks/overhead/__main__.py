"""What composing costs: seconds and memory beside training, and how both grow.

    python -m benchmarks.overhead all --embeddings cifar10_simclr.npz
    python -m benchmarks.overhead epochs --device cuda --network resnet18 --instances 25600 --batch-size 256
    python -m benchmarks.overhead all --embeddings cifar10_simclr.npz --device cuda --network resnet18

Each command prints its rows as a table. It also adds them to a CSV file in the folder `--results`, with the device and
the versions. Git tracks the default folder, whose rows docs/performance.md shows. `all` runs each command in turn, in a
process of its own and with the defaults of its own options. Let nothing else run beside it.

The embeddings file holds `z`, floats [N, d]. Three commands need it: `graphs`, `growth` and `whole-data`.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import csv_files
from ..command_line import make_parser
from ..csv_files import Row
from ..markdown import print_row
from . import encoding, epochs, first_graph, graphs, growth, memory, profile, whole_data

RESULTS = Path(__file__).parent / "results"
COMMANDS: dict[str, Any] = {
    "epochs": epochs,
    "encoding": encoding,
    "profile": profile,
    "graphs": graphs,
    "first-graph": first_graph,
    "memory": memory,
    "growth": growth,
    "whole-data": whole_data,
}
ON_DEVICE = ("epochs", "encoding", "profile", "graphs")  # the others need no GPU


def where(args: argparse.Namespace) -> Row:
    """Return the day, the device and the versions that a row was measured with."""
    on_gpu = args.device == "cuda" and args.command in ON_DEVICE
    return {
        "day": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,  # names the kind of build, which the version in PyPI's metadata does not
        **{name: version(name) for name in ("lightning", "pynndescent")},
    }


def run(args: argparse.Namespace) -> None:
    """Measure what a command names, and print and keep its rows."""
    torch.set_num_threads(args.threads)
    columns = None
    for row in COMMANDS[args.command].rows(args):
        print_row(row, with_header=list(row) != columns)
        columns = list(row)
        csv_files.append(args.results / f"{args.command.replace('-', '_')}.csv", row | where(args))


def run_all(args: argparse.Namespace) -> None:
    """Run every command in a process of its own."""
    for name in COMMANDS:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.overhead", name, *sys.argv[2:]], check=True)


def main() -> None:
    """Run the command that was asked for."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    common.add_argument("--precision", default="32-true")
    common.add_argument("--channels-last", action="store_true", help="keep the network's tensors in that order")
    common.add_argument("--network", default="small", choices=["small", "wide", "resnet18"])
    common.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    common.add_argument("--embeddings", help="an .npz file with z [N, d]")
    common.add_argument("--results", type=Path, default=RESULTS, help="the folder of CSV files to add rows to")
    parser = make_parser("overhead", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            parents=[common],
            description=module.__doc__,
            help=module.__doc__.splitlines()[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    commands.add_parser("all", parents=[common], help="Run every command with its defaults.")
    args = parser.parse_args()
    if args.embeddings is None and args.command in ("graphs", "growth", "whole-data", "all"):
        parser.error(f"{args.command} needs --embeddings: an .npz file with z, floats [N, d].")
    (run_all if args.command == "all" else run)(args)


if __name__ == "__main__":
    main()
