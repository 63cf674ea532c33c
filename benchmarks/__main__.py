"""Runs the benchmark: measures each backend in processes of its own, then draws.

What was found is kept in `benchmarks/results/<backend>.json`; the pictures go to
`docs/benchmarks/` and the tables between the marks in README.md. The part "scale"
counts what each of several devices does, is kept in `scale.json` and told in
`docs/scale.md`.

On a GPU or TPU other cases are timed, of half types and larger batches, and kept in
`benchmarks/results/<backend>-<device>.json`; neither pictures nor README change.
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

from benchmarks import accelerators, chinese, draw, readme, results, scale
from benchmarks.cases import LONGEST_WITH_WHOLE_SCORES, Case, cases, memory_cases
from benchmarks.contestants import decoding
from keras_mha import info

PARTS = ("time", "memory", "decoding")
SCALE = "scale"  # of no backend's contestants
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--backend", action="append", choices=info.BACKENDS)
    parser.add_argument(
        "--no-measuring", action="store_true", help="draw and write again what is kept"
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="time this case only, such as 'window 8192', and keep the others",
    )
    parser.add_argument(
        "--only", choices=(*PARTS, SCALE), help="measure this, keep the others"
    )
    arguments = parser.parse_args()
    if not arguments.no_measuring:
        parts = _parts(arguments.case, arguments.only)
        if "decoding" in parts:
            _require_peer()
        if parts != (SCALE,):
            for backend in arguments.backend or info.BACKENDS:
                device = measure(backend, arguments.case, parts)
                if device != "cpu":
                    accelerators.show(backend, device)
        if parts in (PARTS, (SCALE,)) and not arguments.backend:
            scale.measure()
    kept = results.load()
    if not kept:
        raise SystemExit("nothing has been measured yet: leave out --no-measuring")
    draw.all_pictures(kept, scale.load(), ROOT / "docs" / "benchmarks")
    readme.write(kept, ROOT / "README.md")
    readme.write(kept, ROOT / "README.zh-CN.md", chinese.translated)
    if counted := scale.load():
        readme.replace(ROOT / "docs" / "scale.md", scale.MARKS, scale.table(counted))


def _parts(names: list[str], only: str | None) -> tuple[str, ...]:
    """Returns what is to be measured, of `PARTS`."""
    if names:
        return ("time",)
    return (only,) if only else PARTS


def _require_peer() -> None:
    """Ends the program, before anything is measured, if KerasHub is not installed."""
    try:
        decoding.require_peer()
    except info.MissingExtra as error:
        raise SystemExit(str(error)) from None


def measure(backend: str, names: list[str], parts: tuple[str, ...]) -> str:
    """Measures a backend and keeps what was found.

    Args:
        backend: String, the backend.
        names: List of strings, the only cases to be timed; empty for all.
        parts: Which of `PARTS` to measure. What is not measured is kept.

    Returns:
        The kind of device that it was measured on.
    """
    (asked,) = _lines(backend, "device")
    device = asked["device"]
    if device != "cpu":  # what a process holds says nothing of a device's memory
        parts = ("time",)
    every = cases(backend, device)
    timed = [case for case in every if not names or case.name in names]
    timed = timed if "time" in parts else []
    memory = _memory() if "memory" in parts else []
    found: dict = {"machine": {}, "times": [], "memory": []}
    file = results.path(backend, device)
    if parts != PARTS and file.exists():
        found |= json.loads(file.read_text())
    if memory:
        found["memory"] = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        total = len(timed) + len(memory) + ("decoding" in parts)
        task = progress.add_task(backend, total=total)
        for line in _lines(backend, "time", *names) if timed else ():
            if "started" in line:
                progress.update(task, description=f"{backend}: {line['started']}")
            elif "machine" in line:
                found["machine"] = line["machine"]
            else:
                others = [x for x in found["times"] if x["case"] != line["case"]]
                found["times"] = [*others, line]
                _keep(file, found)
                progress.advance(task)
        for case, contestant in memory:
            progress.update(
                task, description=f"{backend}: memory of {contestant}, {case.name}"
            )
            found["memory"] += _lines(
                backend, "memory", json.dumps(case.config), contestant
            )
            _keep(file, found)
            progress.advance(task)
        if "decoding" in parts:
            progress.update(task, description=f"{backend}: decoding")
            for line in _lines(backend, "decoding"):
                found |= line
            _keep(file, found)
            progress.advance(task)
    return device


def _memory() -> list[tuple[Case, str]]:
    return [
        (case, contestant)
        for case in memory_cases()
        for contestant in (results.OURS, results.KERAS)
        if contestant == results.OURS or case.length < LONGEST_WITH_WHOLE_SCORES
    ]


def _keep(path: Path, found: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _lines(backend: str, *arguments: str) -> Iterator[dict]:
    """Yields what a worker prints, line by line, as it prints it."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if arguments[0] == "memory":
        # What is freed goes back to the system at once: what is measured is in use.
        environment["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    if arguments[0] == "decoding":
        # Between the many small operations of a step threads sleep: those that spin
        # take the core from the one they wait for, if another process has the other.
        environment["OMP_WAIT_POLICY"] = "passive"
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
