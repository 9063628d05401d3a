"""Print the constraints of `make dist`: setup.cfg's lower bounds, and the pins of constraints.txt for all else."""

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# The other versions of torch are downloads of gigabytes, so its pin stays.
PINNED = {"torch"}
# numba asks for one version of llvmlite itself; transformers, datasets and pyarrow for older versions of others.
UNPINNED = {"dill", "fsspec", "huggingface_hub", "llvmlite", "multiprocess", "pandas", "tokenizers"}


def main() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    requirements = [Requirement(line) for group in groups for line in group.split("\n") if line]
    lowest: dict[str, Version] = {}
    for each in requirements:
        for specifier in each.specifier:
            if specifier.operator == ">=" and each.name not in PINNED:
                bound = Version(specifier.version)
                lowest[each.name] = max(bound, lowest.get(each.name, bound))  # two extras may name the same package
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    others = [line for line in pins if line.split("==")[0] not in lowest.keys() | UNPINNED]
    print("\n".join([*(f"{name}=={version}" for name, version in lowest.items()), *others]))


if __name__ == "__main__":
    main()
