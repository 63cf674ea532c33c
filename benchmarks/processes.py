"""Starts the processes that measure, and shows how far they are."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent


def progress(*columns: str) -> Progress:
    """Returns a bar that says what is measured, how much is done, and `columns`."""
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        console=Console(stderr=True),
    )


def lines(
    backend: str,
    module: str,
    *arguments: str,
    given: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[dict]:
    """Yields what a worker prints, line by line, as it prints it.

    Args:
        backend: String, the backend that it measures.
        module: String, the worker's name.
        *arguments: Strings, its command line.
        given: String, its standard input.
        environment: Dictionary of strings, what is to be set beside the usual.

    Raises:
        SystemExit: If the worker failed.
    """
    around = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # What was compiled before would seem to be compiled in no time.
    around.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=around | (environment or {}),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if arguments[:1] == ("memory",) else None,
        text=True,
    )
    try:
        process.stdin.write(given)
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            error = process.stderr.read() if process.stderr else ""
            raise SystemExit(f"the worker under {backend} failed {arguments}\n{error}")
    finally:
        process.kill()  # of no effect once it has ended
        process.wait()
