"""Documented functions of installed Python packages: pairs of a docstring and code, and how they are split."""

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Packages that the extras "benchmarks" and "dev" install. Not among them: copies of other packages (pip, setuptools,
# debugpy, lightning_fabric, pytorch_lightning).
PACKAGES = (
    *("IPython", "PIL", "_pytest", "aiohttp", "attr", "babel", "backrefs", "bs4", "cffi", "click", "cryptography"),
    *("dateutil", "docutils", "fontTools", "fsspec", "griffe", "hypothesis", "ipykernel", "jedi", "jinja2", "joblib"),
    *("jsonargparse", "jupyter_client", "lightning", "llvmlite", "markdown", "matplotlib", "mkdocs", "more_itertools"),
    *("mpmath", "mypy", "narwhals", "nbconvert", "nbformat", "networkx", "numba", "numpy", "packaging", "parso"),
    *("prompt_toolkit", "psutil", "pygments", "pymdownx", "pynndescent", "pyparsing", "requests", "rich", "scipy"),
    *("sklearn", "soupsieve", "sympy", "torch", "torchmetrics", "tornado", "traitlets", "urllib3", "watchdog", "yarl"),
    "zmq",
)
DIGEST = "eb25117d0d64"  # of the functions of `PACKAGES` in the versions of constraints.txt
SKIPPED_FILES = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|conftest|externals?)(/|\.py|_)|/test_")
MIN_WORDS, MIN_CODE = 3, 40  # words of a docstring, characters of code


class Function(NamedTuple):
    """A documented function."""

    folder: str  # of its file, such as "scipy/signal"
    docstring: str  # the first paragraph
    code: str


def words(text: str) -> list[str]:
    """Return lower-case words and numbers; ``snake_case`` and ``camelCase`` are two words each."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def extract(folder: Path) -> Iterator[Function]:
    """Yield the documented functions of a package's folder.

    The code is the function's body without docstring, comments and formatting. The line with ``def`` is left out, and
    the function's own name becomes ``_`` in the body, as a name often says what the docstring says.
    """
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder.parent)
        if SKIPPED_FILES.search(name.as_posix()):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about escapes in strings
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, and samples of broken code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
                first = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
                code = "\n".join(ast.unparse(statement) for statement in node.body[1:])
                yield Function(name.parent.as_posix(), first, re.sub(rf"\b{re.escape(node.name)}\b", "_", code))


def distinct(found: Sequence[Function]) -> list[Function]:
    """Leave out trivial functions, and functions whose docstring or code has the same words as an earlier one."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for function in found:
        said, done = words(function.docstring), words(function.code)
        keys = {("docstring", *said), ("code", *done)}
        if len(said) >= MIN_WORDS and len(function.code) >= MIN_CODE and not keys & seen:
            kept.append(function)
            seen |= keys
    return kept


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package, by its name on import."""
    owners = importlib.metadata.packages_distributions()
    missing = [name for name in packages if name not in owners]
    if missing:
        raise ImportError(
            f"Reading the functions needs {', '.join(missing)}: pip install --constraint constraints.txt "
            "'.[benchmarks,dev]'"
        )
    return {name: importlib.metadata.version(owners[name][0]) for name in packages}


@lru_cache(maxsize=1)
def functions(packages: Sequence[str] = PACKAGES) -> list[Function]:
    """Return the distinct documented functions of the installed packages.

    They are read once, in about a minute, and kept in the user's cache with the packages' versions. Warns where they
    are not the functions that the study's results were measured on.
    """
    installed = versions(packages)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bs-lightning"
    path = cache / f"functions-{digest(installed)}.json.gz"
    if not path.exists():
        found: list[Function] = []
        for name in packages:
            (folder,) = importlib.util.find_spec(name).submodule_search_locations  # type: ignore[union-attr,misc]
            found += extract(Path(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.compress(json.dumps({"versions": installed, "functions": distinct(found)}).encode()))
        partial.replace(path)
    found = [Function(*function) for function in json.loads(gzip.decompress(path.read_bytes()))["functions"]]
    if packages == PACKAGES and digest(found) != DIGEST:
        warnings.warn(
            f"The {len(found)} functions of the installed packages are not those of the study (checksum "
            f"{digest(found)}, not {DIGEST}), so results differ. Install with --constraint constraints.txt.",
            stacklevel=2,
        )
    return found


def digest(value: object) -> str:
    """Return a short checksum of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def hold_out(folders: Sequence[str], n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split by folder, so that near copies, which mostly share a folder, are on one side.

    Returns:
        The indices of the functions to train on, and of ``n`` held-out functions. The last folder that is held out has
        functions that are in neither.
    """
    names, numbers = np.unique(np.array(folders), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))[numbers]
    by_folder = np.argsort(order, kind="stable")
    held_out = by_folder[:n]
    return np.flatnonzero(order > order[held_out[-1]]), np.sort(held_out)


def same_words(found: Sequence[Function]) -> NDArray[np.int64]:
    """Number the functions; functions have one number if a docstring or code differs in numbers only.

    Returns:
        int64 ``[n]``. Functions joined through others have one number too.
    """
    numbers = np.arange(len(found))
    for part in ("docstring", "code"):
        firsts: dict[tuple[str, ...], int] = {}
        for number, function in enumerate(found):
            key = tuple(word for word in words(getattr(function, part)) if not word.isdigit())
            first = firsts.setdefault(key, number)
            if first != number:
                numbers[numbers == numbers[number]] = numbers[first]
    return numbers
