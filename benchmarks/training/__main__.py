"""Do harder batches make better models, and when?

    python -m benchmarks.training run --task omniglot-pairs --arms uniform pool10 --seeds 0 1 2 --data-dir DIR \\
        --results results.csv
    python -m benchmarks.training table --results benchmarks/training/results/*.csv
    python -m benchmarks.training overview --results benchmarks/training/results/*.csv
    python -m benchmarks.training worth --results benchmarks/training/results/*.csv
    python -m benchmarks.training loss --results benchmarks/training/results/*.csv --out loss.png
    python -m benchmarks.training plot --results benchmarks/training/results/*.csv --out plot.png
    python -m benchmarks.training why --results benchmarks/training/results/*.csv --out why.png
    python -m benchmarks.training list

`run` adds a row to the results file for each finished run. It skips the runs that the file already holds, so you can
resume an interrupted study. Only one process at a time may write to a file. DIR has the subfolders omniglot, cifar10
and sts; code-search reads the installed packages instead, in about a minute the first time.

What would larger uniform batches gain? For batches of 4 times the size, give `--batch-size` 4 times the default: the
steps stay equal, and the epochs are 4 times as many. For equal epochs, also give `--steps` a quarter of the default.
Training lasts whole epochs, so the steps are equal up to half an epoch, and an epoch has fewer, larger batches.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from ..command_line import make_parser
from ..runs import run_missing, show, wanted
from . import report, study
from .arms import ARMS

TEXTS = {"table": report.tables, "overview": report.overview, "worth": report.worth}
FIGURES = {"plot": report.plot, "loss": report.plot_loss, "why": report.plot_uniformity}


def main() -> None:
    """Run the command that was asked for."""
    args = arguments()
    if args.command == "run":
        run(args)
    elif args.command in TEXTS:
        print("\n".join(TEXTS[args.command](args.results, args.compare_with)))
    elif args.command in FIGURES:
        FIGURES[args.command](args.results).savefig(args.out)
    else:
        for name, task in study.TASKS.items():
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in task.defaults.items()))
        print("arms: " + ", ".join(ARMS))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("training", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure the runs that the results file lacks")
    run.add_argument("--task", required=True, choices=study.TASKS)
    run.add_argument("--arms", nargs="+", default=["uniform", "pool10"], choices=ARMS, metavar="ARM")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--data-dir", required=True, type=Path)
    run.add_argument("--results", required=True, type=Path, help="CSV file to add rows to")
    run.add_argument("--threads", type=int, default=1)
    run.add_argument(
        "--accelerator", default="cpu", help="Lightning's name of what to train on; the evaluation runs on the CPU"
    )
    group = run.add_argument_group("settings", "recorded in the results; `list` prints each task's defaults")
    settings = {key: type(value) for task in study.TASKS.values() for key, value in task.defaults.items()}
    for key, kind in settings.items():
        group.add_argument(f"--{key.replace('_', '-')}", type=kind)
    for name, words in (
        ("table", "print all measures as markdown"),
        ("overview", "print the main results as markdown"),
        ("worth", "print what arms gain beside larger uniform batches and longer trainings, as markdown"),
        ("loss", "draw what arms gain against the loss of uniform batches"),
        ("plot", "draw the main results of each task at its default settings"),
        ("why", "draw what each arm gains against how it changes uniformity"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("--results", required=True, type=Path, nargs="+")
        if name in TEXTS:
            command.add_argument(
                "--compare-with",
                default=report.UNIFORM,
                choices=ARMS,
                metavar="ARM",
                help="print the other arms' differences to this arm",
            )
        else:
            command.add_argument("--out", required=True, type=Path, help="PNG file")
    commands.add_parser("list", help="print the tasks, their settings, and the arms")
    args = parser.parse_args()
    if args.command == "run":
        defaults = study.TASKS[args.task].defaults
        given = {key: getattr(args, key) for key in settings if getattr(args, key) is not None}
        for key in given:
            if key not in defaults:
                parser.error(f"{args.task} has no setting {key}. It has {', '.join(defaults)}.")
        args.settings = defaults | given
    elif args.command != "list":
        for path in args.results:
            if not path.exists():
                parser.error(f"--results: there is no file {path}.")
    return args


def run(args: argparse.Namespace) -> None:
    """Train and measure, and print a line for each run."""
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # the threads that scikit-learn uses
    runs = wanted({"task": args.task}, args.arms, args.seeds, args.settings)
    show(run_missing(runs, partial(study.run, args.data_dir, args.accelerator), args.results))


if __name__ == "__main__":
    main()
