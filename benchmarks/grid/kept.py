"""What was measured, a line of JSON each, kept as soon as it is known."""

import json
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from keras_mha import info


class Kept:
    """The lines of one backend.

    Args:
        path: Path, the file, which need not be there yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.machine: dict[str, Any] = {}
        self.found: dict[str, dict[str, Any]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # half a line: the run was stopped as it wrote
            return
        if "machine" in record:
            self.machine = record["machine"]
        else:
            self.found[record["name"]] = record  # the latest counts

    def begin_anew(self) -> None:
        """Drops what is kept."""
        self.path.unlink(missing_ok=True)
        self.machine, self.found = {}, {}

    def set_machine(self, machine: dict[str, Any]) -> None:
        """Keeps what is measured on; raises if the rest was measured on another."""
        if not self.machine:
            self._append({"machine": machine})
        elif machine != self.machine:
            raise SystemExit(
                f"{self.path.name} was begun on {self.machine}, this is {machine}: "
                "measure it anew with --again"
            )

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a result, which has a `"name"`."""
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record) + "\n"
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            line = "\n" + line  # not behind half a line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._read(line)


def kept(part: str, backend: str) -> Kept:
    """Returns what is kept of `"grid"` or `"thresholds"` under a backend."""
    return Kept(FOLDER / part / f"{backend}.jsonl")


def load(part: str) -> dict[str, Kept]:
    """Returns what is kept of a part, by backend, where there is something."""
    found = {backend: kept(part, backend) for backend in info.BACKENDS}
    return {backend: each for backend, each in found.items() if each.found}
