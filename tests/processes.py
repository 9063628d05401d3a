"""Starts ``run.py`` as users start a training script, and reads what it saw."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("run.py")


def finish(command, timeout=240):
    """Run a command to its end, and in any case the processes it has started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        _, process.error = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process


def run(folder, *, fails=False, devices=2, timeout=240, **settings):
    """Run to the end and return what each rank saw; with ``fails``, what the run complained of."""
    folder.mkdir(exist_ok=True)
    settings = {"strategy": "ddp" if devices > 1 else "auto", "devices": devices} | settings
    done = finish([sys.executable, SCRIPT, folder, json.dumps(settings)], timeout)
    if fails:
        assert done.returncode != 0
        return done.error
    assert done.returncode == 0, done.error[-4000:]
    return seen(folder, devices)


def seen(folder, world_size):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def batches_by_step(folder, world_size):
    """The global batches by step, as the last run that trained each step noted them."""
    ranks = []
    for rank in range(world_size):
        lines = (line.split(":") for line in (folder / f"rank{rank}.txt").read_text().splitlines())
        ranks.append({int(step): json.loads(batch) for step, batch in lines})
    return {step: sum((rank[step] for rank in ranks), []) for step in sorted(ranks[0])}
