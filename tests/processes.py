"""Starts ``run.py`` as users start a training script, and reads what the run recorded."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).with_name("run.py")


class Finished(NamedTuple):
    """How a command ended."""

    returncode: int
    error: str  # what it wrote to its standard error


def finish(command: list[Any], timeout: float = 240, cwd: Path | None = None) -> Finished:
    """Run a command to its end; then end every process that it has started and left behind."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )
    try:
        _, error = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, error)


def run(folder: Path, *, fails: bool = False, devices: int = 2, timeout: float = 240, **settings: Any) -> Any:
    """Run to the end and return what each rank recorded; with ``fails``, return the error output."""
    folder.mkdir(exist_ok=True)
    settings = {"strategy": "ddp" if devices > 1 else "auto", "devices": devices} | settings
    done = finish([sys.executable, SCRIPT, folder, json.dumps(settings)], timeout)
    if fails:
        assert done.returncode != 0
        return done.error
    assert done.returncode == 0, done.error[-4000:]
    return seen(folder, devices)


def seen(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What each rank recorded at the end of training."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def batches_by_step(folder: Path, world_size: int) -> dict[int, list[int]]:
    """Return the global batches by step; a step that was trained twice counts with its last batch."""
    ranks = []
    for rank in range(world_size):
        lines = (line.split(":") for line in (folder / f"rank{rank}.txt").read_text().splitlines())
        ranks.append({int(step): json.loads(batch) for step, batch in lines})
    return {step: sum((rank[step] for rank in ranks), []) for step in sorted(ranks[0])}
