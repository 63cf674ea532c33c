"""Runs the benchmark: measures each backend in processes of its own, then draws.

What was found is kept in `benchmarks/results/<backend>.json`; the pictures go to
`docs/benchmarks/` and the tables between the marks in README.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import draw, readme, results
from benchmarks.cases import LONGEST_WITH_WHOLE_SCORES, cases, memory_cases
from keras_mha import info

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--backend", action="append", choices=info.BACKENDS)
    parser.add_argument(
        "--no-measuring", action="store_true", help="draw and write again what is kept"
    )
    arguments = parser.parse_args()
    if not arguments.no_measuring:
        for backend in arguments.backend or info.BACKENDS:
            measure(backend)
    kept = results.load()
    if not kept:
        raise SystemExit("nothing has been measured yet: leave out --no-measuring")
    draw.all_pictures(kept, ROOT / "docs" / "benchmarks")
    readme.write(kept, ROOT / "README.md")


def measure(backend: str) -> None:
    """Measures times and memory under a backend and keeps them."""
    memory = [
        (case, contestant)
        for case in memory_cases(backend)
        for contestant in ("keras_mha", "keras")
        if contestant == "keras_mha" or case.length < LONGEST_WITH_WHOLE_SCORES
    ]
    found: dict = {"machine": {}, "times": [], "memory": []}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task(backend, total=len(cases(backend)) + len(memory))
        for line in _lines(backend, "time"):
            if "started" in line:
                progress.update(task, description=f"{backend}: {line['started']}")
            elif "machine" in line:
                found["machine"] = line["machine"]
            else:
                found["times"].append(line)
                _keep(backend, found)
                progress.advance(task)
        for case, contestant in memory:
            progress.update(
                task, description=f"{backend}: memory of {contestant}, {case.name}"
            )
            found["memory"] += _lines(
                backend, "memory", json.dumps(case.config), contestant
            )
            _keep(backend, found)
            progress.advance(task)


def _keep(backend: str, found: dict) -> None:
    path = results.path(backend)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _lines(backend: str, *arguments: str) -> Iterator[dict]:
    """Yields what a worker prints, line by line, as it prints it."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if arguments[0] == "memory":
        # What is freed goes back to the system at once: what is measured is in use.
        environment["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if arguments[0] == "memory" else None,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    if process.wait():
        error = process.stderr.read() if process.stderr else ""
        raise SystemExit(f"the worker under {backend} failed {arguments}\n{error}")


if __name__ == "__main__":
    main()
