"""Call the pure functions with random arguments, valid and not, and check what they return.

A call must return what the function promises, or raise a ``ValueError`` or ``TypeError`` in words: by a ``raise``
statement, and not from within an operation. Valid arguments must not be refused. The call must leave its arguments and
the global random states as they were, and a second call must return the same.

The cases run in a process of their own. A case that does not end within 60 seconds counts as a hang, and a case that
ends the process as a crash. The next case runs in a new process.
"""

import copy
import linecache
import multiprocessing
import random
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bs_lightning
from benchmarks.stress.subjects import SUBJECTS, Case, Draw

LIBRARY = str(Path(bs_lightning.__file__).parent)
PATIENCE = 60.0  # seconds
KINDS = [
    "other exceptions", "errors not in words", "valid arguments refused", "broken promises", "different second calls",
    "changed arguments", "touched random states", "hangs", "crashes",
]  # fmt: skip


def failure_of(case: Case) -> tuple[str, str] | None:
    """Make a case's call. Return the kind of the failure and what happened, or ``None``."""
    before = copy.deepcopy(case.arguments)
    states = random_states()
    try:
        result = case.call(**case.arguments)
    except (ValueError, TypeError) as error:
        if case.valid:
            return "valid arguments refused", repr(error)
        return None if in_words(error, case) else ("errors not in words", last_line(error))
    except Exception as error:
        return "other exceptions", last_line(error)
    if not same(states, random_states()):
        return "touched random states", ""
    if not same(before, case.arguments):
        return "changed arguments", ""
    try:
        case.check(result, **case.arguments)
    except Exception as error:
        return "broken promises", f"{last_line(error)}; returned {short(result)}"
    if not same(result, case.call(**case.arguments)):
        return "different second calls", f"returned {short(result)}"
    return None


def random_states() -> list[Any]:
    """Return the states of the global random generators."""
    return [random.getstate(), np.random.get_state(), torch.get_rng_state()]


def in_words(error: BaseException, case: Case) -> bool:
    """Whether an error was raised by a ``raise`` statement: of the library, or of torch if it names an argument."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0)
    named = any(name in str(error) for name in case.arguments)
    return line.strip().startswith("raise") and (named or frame.filename.startswith(LIBRARY))


def last_line(error: BaseException) -> str:
    """Return an error and the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno}: {frame.line})"


def same(a: Any, b: Any) -> bool:
    """Whether two results or arguments are equal. Objects without a value are equal to themselves."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        a, b = (each.detach().to_dense().float().numpy() if each.is_floating_point() else each for each in (a, b))
    if isinstance(a, np.ndarray | np.generic | torch.Tensor):
        return type(a) is type(b) and repr(a) == repr(b) and (np.asarray(a).tobytes() == np.asarray(b).tobytes())
    return type(a) is type(b) and (a == b or repr(a) == repr(b) or type(a) is object)


def short(value: Any) -> str:
    """Return a text of bounded length."""
    text = repr(value)
    return text if len(text) < 1500 else f"{text[:700]} ... {text[-700:]}"


def make_case(name: str, number: int, seed: int) -> Case:
    """Draw a case: the same one for equal arguments."""
    return SUBJECTS[name](Draw(f"{seed} {name} {number}"))


def work(cases: list[tuple[str, int]], seed: int, parent: Connection) -> None:
    """Run cases, and tell the parent process about each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, number in cases:
        failure = failure_of(make_case(name, number, seed))
        parent.send(failure and (failure[0], f"{failure[1]}\n    {short(make_case(name, number, seed).arguments)}"))


def main(n_cases: int, seed: int, seconds: float) -> int:
    """Run cases of all functions in turn until there are enough, or the time is over. Return the exit status."""
    stop = time.monotonic() + seconds
    cases = [(name, number) for number in range(n_cases) for name in SUBJECTS]
    run: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    while cases and time.monotonic() < stop:
        parent, child = context.Pipe()
        process = context.Process(target=work, args=(cases, seed, child))
        process.start()
        child.close()
        while cases and time.monotonic() < stop:
            failure = None
            ended = False
            try:
                if parent.poll(PATIENCE):
                    failure = parent.recv()
                else:
                    failure, ended = ("hangs", ""), True
            except EOFError:
                process.join()
                if process.exitcode == 1:
                    raise RuntimeError(f"The harness cannot make case {cases[0]}.") from None
                failure, ended = ("crashes", f"exit code {process.exitcode}"), True
            name, number = cases.pop(0)
            run[name] += 1
            if failure is not None:
                failures[failure[0]] += 1
                print(f"{failure[0]}: {name}, case {number}: {failure[1]}", flush=True)
            if ended:
                break
        process.kill()
        process.join()
    print(", ".join(f"{count} of {name}" for name, count in run.items()))
    print(f"{run.total()} cases: " + ", ".join(f"{failures[kind]} {kind}" for kind in KINDS))
    return int(failures.total() > 0)
