"""Two processes of torch's that work together, over loopback."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

ROOT = Path(__file__).resolve().parents[2]
# The processes speak over loopback, whatever the machine's name leads to.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
SECONDS = 300  # for all that a pair does
ATTEMPTS = 2


def run_pair_once(module: str, folders: pytest.TempPathFactory) -> Path:
    """Returns the folder that a pair wrote to, one for all workers of a run of tests.

    Two pairs at a time would wait four times as long for a processor.

    Args:
        module: As of `run_pair`.
        folders: Makes the folder.

    Raises:
        AssertionError: As of `run_pair`.
    """

    def new_folder() -> Path:
        return folders.mktemp(module)

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:  # a run without workers
        return run_pair(module, new_folder)
    note = folders.getbasetemp().parent / f"{module}-{run}"
    with filelock.FileLock(f"{note}.lock"):
        if not note.exists():
            written = Path(f"{note}.written")
            written.write_text(str(run_pair(module, new_folder)))
            written.replace(note)  # which is never there in part
    return Path(note.read_text())


def run_pair(module: str, new_folder: Callable[[], Path]) -> Path:
    """Runs a module in two processes, and returns the folder that they wrote to.

    A pair of which one fails is followed by another: whether two processes find each
    other, and in time, is up to the machine too. What they compute is not, and is
    looked at when both have ended well.

    Args:
        module: What they run, `python -m module FOLDER` with `RANK` 0 and 1.
        new_folder: Returns another empty folder each time.

    Raises:
        AssertionError: If every pair failed; with what its processes printed.
    """
    for _ in range(ATTEMPTS):
        folder = new_folder()
        failed = _failures(_started(module, folder))
        if not failed:
            return folder
        warnings.warn(f"A pair of {module} failed.\n{failed}", stacklevel=2)
    raise AssertionError(f"{ATTEMPTS} pairs of {module} failed, the last so:\n{failed}")


def _started(module, folder):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **LOOPBACK,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def _failures(processes):
    """Returns how processes ended that did not end well, and what they printed last."""
    failures = []
    for rank, process in enumerate(processes):
        printed = _printed(process)
        if process.returncode != 0:
            status = f"process {rank} ended with {process.returncode}"
            failures.append(f"{status}:\n{printed[-5000:]}")
    return "\n".join(failures)


def _printed(process):
    """Returns what a process printed once it is done, or was killed as too slow."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]
