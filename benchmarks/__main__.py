"""Runs the benchmark: measures each backend in processes of its own, then draws.

What was found is kept in `benchmarks/results/`; the pictures go to `docs/benchmarks/`
and the tables between the marks in README.md. The part "grid" is over the shapes that
people train with, "thresholds" says from where on our tiles are the faster. The part
"scale" counts what each of several devices does and is told in `docs/scale.md`.

On a GPU or TPU only "time" is measured, of other cases: half types and larger batches.
It is kept in `benchmarks/results/<backend>-<device>.json`; neither pictures nor README
change.

A run that was stopped goes on where it was.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks import accelerators, chinese, draw, readme, results, scale, unfinished
from benchmarks.cases import LONGEST_WITH_WHOLE_SCORES, Case, cases, memory_cases
from benchmarks.contestants import decoding
from benchmarks.grid import pages
from benchmarks.grid import run as grid
from benchmarks.processes import ROOT, lines, progress
from keras_mha import info

OF_CASES = ("time", "memory", "decoding")  # kept in one file a backend
OF_GRID = ("grid", "thresholds")
PARTS = (*OF_CASES, *OF_GRID)
# What a process holds says nothing of a device's memory; decoding, the grid and the
# thresholds are of calls as a CPU gets them.
OF_ACCELERATORS = ("time",)
SCALE = "scale"  # of no backend's contestants
WORKER = "benchmarks.worker"


def main() -> None:
    """Does what the command line asks for."""
    arguments = _arguments()
    if not arguments.no_measuring:
        measure_all(arguments)
    kept = results.load()
    if not kept:
        raise SystemExit("nothing has been measured yet: leave out --no-measuring")
    draw.all_pictures(kept, scale.load(), ROOT / "docs" / "benchmarks")
    readme.write(kept, ROOT / "README.md")
    readme.write(kept, ROOT / "README.zh-CN.md", chinese.translated)
    pages.write(ROOT)
    if counted := scale.load():
        readme.replace(ROOT / "docs" / "scale.md", scale.MARKS, scale.table(counted))


def measure_all(arguments: argparse.Namespace) -> None:
    """Measures what the command line asks for, a backend after the other."""
    parts = _parts(arguments.case, arguments.only)
    if "decoding" in parts:
        _require_peer()
    backends = () if parts == (SCALE,) else arguments.backend or info.BACKENDS
    devices = {backend: _device(backend) for backend in backends}
    on = {backend: _parts_on(device, parts) for backend, device in devices.items()}
    asked = [
        _note(results.path(backend, device), part)
        for backend, device in devices.items()
        for part in on[backend]
    ]
    if arguments.again:
        unfinished.forget(asked)
    for backend, device in devices.items():
        measure(backend, arguments.case, on[backend], device)
        if device != "cpu":
            accelerators.show(backend, device)
    if parts in (PARTS, (SCALE,)) and not arguments.backend:
        scale.measure()
    if not arguments.case:
        unfinished.forget(asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--backend", action="append", choices=info.BACKENDS)
    parser.add_argument(
        "--no-measuring", action="store_true", help="draw and write again what is kept"
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="time this case only, such as 'window 8192', and keep the others; of the "
        "grid, with --only grid, all whose names hold it, such as '1x16 8x64 eager'",
    )
    parser.add_argument(
        "--only", choices=(*PARTS, SCALE), help="measure this, keep the others"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="begin anew, where a run that was stopped would go on",
    )
    return parser.parse_args()


def _parts(names: list[str], only: str | None) -> tuple[str, ...]:
    """Returns what is to be measured, of `PARTS`."""
    if names:
        return (only,) if only in OF_GRID else ("time",)
    return (only,) if only else PARTS


def _device(backend: str) -> str:
    """Returns the kind of device that a backend computes on."""
    (line,) = lines(backend, WORKER, "device")
    return line["device"]


def _parts_on(device: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the parts that are measured on a kind of device; ends the
    program if there are none."""
    found = tuple(x for x in parts if device == "cpu" or x in OF_ACCELERATORS)
    if not found:
        raise SystemExit(
            f"on a {device} {', '.join(OF_ACCELERATORS)} is measured, not "
            f"{', '.join(parts)}"
        )
    return found


def _note(file: Path, part: str) -> str:
    """Names a part of a file's results among those that are unfinished."""
    return f"{file.stem} {part}"


def _require_peer() -> None:
    """Ends the program, before anything is measured, if KerasHub is not installed."""
    try:
        decoding.require_peer()
    except info.MissingExtra as error:
        raise SystemExit(str(error)) from None


def measure(
    backend: str, names: list[str], parts: tuple[str, ...], device: str = "cpu"
) -> None:
    """Measures a backend and keeps what was found.

    Args:
        backend: String, the backend.
        names: List of strings, the only cases to be timed; empty for all.
        parts: Which of `PARTS` to measure, of `OF_ACCELERATORS` if the device is one.
            What is not measured is kept.
        device: String, the kind of device that the backend computes on.
    """
    if of_cases := [part for part in OF_CASES if part in parts]:
        measure_cases(backend, names, of_cases, device)
    for part in OF_GRID:
        if part in parts:
            grid.measure(part, backend, names)


def measure_cases(
    backend: str, names: list[str], parts: Iterable[str], device: str
) -> None:
    """Measures what is missing of a backend's cases, memory and decoding.

    Args:
        backend: String, the backend.
        names: List of strings, the only cases to be timed, and those again; empty for
            all that is missing.
        parts: Which of `OF_CASES` to measure.
        device: String, the kind of device that the backend computes on.
    """
    file = results.path(backend, device)
    found = _begun(file, () if names else parts)
    timed, memory = [], []
    if "time" in parts:
        timed = [c for c in cases(backend, device) if not names or c.name in names]
        if not names:
            done = [Case(**each["case"]) for each in found["times"]]
            timed = [case for case in timed if case not in done]
    if "memory" in parts:
        done = [(Case(**x["case"]), x["contestant"]) for x in found["memory"]]
        memory = [each for each in _memory() if each not in done]
    decodes = "decoding" in parts and "decoding" not in found
    with progress() as bar:
        task = bar.add_task(backend, total=len(timed) + len(memory) + decodes)
        for line in _timed(backend, timed):
            if "started" in line:
                bar.update(task, description=f"{backend}: {line['started']}")
            elif "machine" in line:
                _set_machine(found, line["machine"], may_differ=bool(names))
            else:
                case = Case(**line["case"])
                others = [x for x in found["times"] if Case(**x["case"]) != case]
                found["times"] = [*others, line]
                _keep(file, found)
                bar.advance(task)
        for case, contestant in memory:
            bar.update(
                task, description=f"{backend}: memory of {contestant}, {case.name}"
            )
            found["memory"] += _measured_memory(backend, case, contestant)
            _keep(file, found)
            bar.advance(task)
        if decodes:
            bar.update(task, description=f"{backend}: decoding")
            for line in _decoded(backend):
                found |= line
            _keep(file, found)
            bar.advance(task)


def _begun(file: Path, parts: Iterable[str]) -> dict:
    """Returns what is kept in a file, without the parts that begin anew."""
    found: dict = {"machine": {}, "times": [], "memory": []}
    if file.exists():
        found |= json.loads(file.read_text())
    anew = [x for x in parts if _note(file, x) not in unfinished.parts()]
    if "time" in anew:
        found |= {"machine": {}, "times": []}
    if "memory" in anew:
        found["memory"] = []
    if "decoding" in anew:
        found.pop("decoding", None)
    _keep(file, found)
    unfinished.note(_note(file, part) for part in anew)
    return found


def _set_machine(found: dict, machine: dict, may_differ: bool) -> None:
    if found["machine"] not in ({}, machine) and not may_differ:
        raise SystemExit(
            f"the run was begun on {found['machine']}, this is {machine}: measure it "
            "anew with --again"
        )
    found["machine"] = machine


def _memory() -> list[tuple[Case, str]]:
    return [
        (case, contestant)
        for case in memory_cases()
        for contestant in (results.OURS, results.KERAS)
        if contestant == results.OURS or case.length < LONGEST_WITH_WHOLE_SCORES
    ]


def _keep(path: Path, found: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)  # all of it or nothing, if the run is stopped


def _timed(backend: str, timed: list[Case]) -> Iterable[dict]:
    names = [case.name for case in timed]
    return lines(backend, WORKER, "time", *names) if names else ()


def _measured_memory(backend: str, case: Case, contestant: str) -> Iterable[dict]:
    # What is freed goes back to the system at once: what is measured is in use.
    freed = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    what = json.dumps(case.config), contestant
    return lines(backend, WORKER, "memory", *what, environment=freed)


def _decoded(backend: str) -> Iterable[dict]:
    # Between the many small operations of a step threads sleep: those that spin
    # take the core from the one they wait for, if another process has the other.
    return lines(
        backend, WORKER, "decoding", environment={"OMP_WAIT_POLICY": "passive"}
    )


if __name__ == "__main__":
    main()
