"""How hard each composer's batches are, what they cost, and whether the paper's graph does what the paper says.

    python -m benchmarks.composers table --embeddings embeddings.npz
    python -m benchmarks.composers paper --embeddings embeddings.npz
    python -m benchmarks.composers escape --embeddings embeddings.npz
    python -m benchmarks.composers scale
    python -m benchmarks.composers plot

The embeddings file holds `z`, floats [N, d], and optionally labels `y`, integers [N]. `table`, `paper`, `escape` and
`scale` print markdown and add their rows to a CSV file in the folder `--results`. `plot` draws the newest rows of these
files. By default, `--results` and `--out` are the folders of the files that docs/composers.md shows; git tracks them.
Install `bs-lightning[benchmarks]` first. At its end, `table` lists the composers that it skipped because there are too
few instances. Its columns:

- graph seconds, batch seconds: for one epoch, without compilation. A composer that does not time its graph has all its
  seconds in the second column. Pools leave out the instances that do not fill a pool; their seconds are scaled up to
  all instances.
- hardness: mean cosine similarity of true negatives (without labels: of all pairs).
- false-negative rate: share of the in-batch pairs that have the same label.
- false-negative mass: the false negatives' share of a softmax over similarity / `--temperature`. An InfoNCE loss sees
  this share.
- root similarity: mean similarity of a batch's first instance (the root, if the composer walks) to the others.
- seen: share of the instances that are in some batch of the epoch. Instances that pools leave out do not count.
- peak megabytes: growth of the process's memory while it composes. Each row has a new process, because a peak never
  falls.
"""

import argparse
from pathlib import Path

from ..command_line import make_parser
from . import escape, paper, plot, scale, table
from .catalog import SCALED

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("composers", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("table", "measure every composer on given embeddings"),
        ("paper", "compare RandomCandidateGraph with the graph of the paper's public code"),
        ("escape", "compare how far walks go with the bound that the paper cites"),
        ("scale", "measure time and memory for growing synthetic data"),
        ("plot", "draw the rows of `table` and `scale`"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
        if name != "plot":
            command.add_argument("--batch-size", type=int, default=256)
        if name in ("table", "paper", "escape"):
            command.add_argument("--embeddings", required=True, help="an .npz file with z [N, d] and optionally y [N]")
            command.add_argument("--instances", type=int, help="use only this many, from the start")
    commands.choices["table"].add_argument("--temperature", type=float, default=0.5, help="for the false-negative mass")
    commands.choices["table"].add_argument("--only", nargs="+", default=[], help="composers, by family or by full name")
    commands.choices["paper"].add_argument("--repeats", type=int, default=5)
    commands.choices["escape"].add_argument("--share", type=float, default=0.1, help="size of a set, of all instances")
    commands.choices["scale"].add_argument("--only", nargs="+", choices=SCALED, default=SCALED)
    commands.choices["scale"].add_argument("--largest", type=int, default=scale.SIZES[-1], help="largest N")
    commands.choices["scale"].add_argument(
        "--seconds", type=float, default=60, help="stop a composer after the first N that takes longer"
    )
    commands.choices["plot"].add_argument("--out", type=Path, default=DOCS, help="folder of the PNG files")
    args = parser.parse_args()
    if args.command != "plot" and args.batch_size < 2:
        parser.error(f"--batch-size must be at least 2, got {args.batch_size}. The docs use 256.")
    return args


def main() -> None:
    """Run the command that was asked for."""
    args = arguments()
    commands = {"table": table.run, "paper": paper.run, "escape": escape.run, "scale": scale.run, "plot": plot.run}
    commands[args.command](args)


if __name__ == "__main__":
    main()
