"""Starts ``run.py`` as users start a training script, and reads what the run recorded."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).with_name("run.py")
PATIENCE = 60.0  # seconds without progress after which a run counts as hanging
LIMIT = 600.0  # seconds after which a command counts as hanging; busy cores slow down all of it


class Hung(Exception):
    """A command that made no progress; the text is what it wrote to its standard error."""


class Finished(NamedTuple):
    """How a command ended."""

    returncode: int
    error: str  # what it wrote to its standard error


def finish(
    command: list[Any], timeout: float = LIMIT, cwd: Path | None = None, watched: Path | None = None
) -> Finished:
    """Run a command to its end; then end every process that it has started and left behind.

    Args:
        command: The command.
        timeout: Seconds after which the command is killed.
        cwd: The folder that it runs in.
        watched: A folder. If no file in it changes for 60 seconds, the command is killed.

    Raises:
        Hung: If nothing changed in the watched folder; the text shows where the processes were.
        subprocess.TimeoutExpired: If the command took longer than ``timeout``; a note shows where the processes were.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )
    started = time.time()
    try:
        while True:
            try:
                _, error = process.communicate(timeout=timeout if watched is None else 1)
                break
            except subprocess.TimeoutExpired as late:
                now = time.time()
                if watched is not None and now - _last_change(watched, since=started) > PATIENCE:
                    raise Hung(_last_words(process)) from None
                if now - started > timeout:
                    late.add_note(_last_words(process))
                    raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, error)


def _last_change(folder: Path, since: float) -> float:
    times = [since]
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that is being replaced
            times.append(file.stat().st_mtime)
    return max(times)


def _last_words(process: "subprocess.Popen[str]") -> str:
    """Ask a run's processes in turn where they are (``run.py`` answers to this signal), and kill them."""
    for entry in Path("/proc").glob("[0-9]*"):  # empty where there is no such folder
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGUSR1)
                time.sleep(0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[1]


def run(folder: Path, *, fails: bool = False, devices: int = 2, **settings: Any) -> Any:
    """Run to the end and return what each rank recorded; with ``fails``, return the error output."""
    done = _start({folder: settings}, devices)
    if fails:
        assert done.returncode != 0
        return done.error
    assert done.returncode == 0, done.error[-4000:]
    return seen(folder, devices)


def run_all(folder: Path, runs: dict[str, dict[str, Any]], devices: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Run each in its subfolder, in the same processes, whose start takes longer; return what each rank recorded."""
    done = _start({folder / name: settings for name, settings in runs.items()}, devices)
    assert done.returncode == 0, done.error[-4000:]
    return {name: seen(folder / name, devices) for name in runs}


def _start(runs: dict[Path, dict[str, Any]], devices: int) -> Finished:
    command: list[Any] = [sys.executable, SCRIPT]
    for folder, settings in runs.items():
        folder.mkdir(exist_ok=True)
        strategy = {"strategy": "ddp" if devices > 1 else "auto"}
        command += [folder, json.dumps(strategy | {"devices": devices} | settings)]
    return finish(command)


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
