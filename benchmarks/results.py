"""What was measured, looked up by case."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Step
from keras_mha import info

FOLDER = Path(__file__).resolve().parent / "results"
OURS, KERAS, KERAS_HUB = "keras_mha", "keras", "keras_hub"


class Results:
    """What is kept of one backend.

    Args:
        backend: String, the backend's name.
        kept: Dictionary, the JSON file's content.
    """

    def __init__(self, backend: str, kept: dict[str, Any]):
        self.backend = backend
        self.machine = kept["machine"]
        self._times = {Case(**each["case"]): each["times"] for each in kept["times"]}
        self._memory = {
            (Case(**each["case"]), each["contestant"]): each for each in kept["memory"]
        }
        self.decoding = kept.get("decoding", {"steps": []})
        self._steps = {
            Step(**each["step"]): each["times"] for each in self.decoding["steps"]
        }

    def cases(self) -> list[Case]:
        """Returns all cases that were timed."""
        return list(self._times)

    def times(self, case: Case, kind: str) -> dict[str, dict[str, float]]:
        """Returns the contestants' times of `"forward"` or `"training"`, if any."""
        return self._times.get(case, {}).get(kind, {})

    def ratio(self, case: Case, kind: str) -> float | None:
        """Returns how many times as long as ours Keras's layer takes."""
        times = self.times(case, kind)
        if OURS not in times or KERAS not in times:
            return None
        return times[KERAS]["median"] / times[OURS]["median"]

    def seconds(self, step: Step) -> float | None:
        """Returns what a step of decoding takes, the median."""
        return self._steps[step]["median"] if step in self._steps else None

    def prefix_seconds(self) -> float | None:
        """Returns what the prefix run again takes, the median."""
        return self.decoding["prefix"]["median"] if self._steps else None

    def over_length(self, kind: str, contestant: str) -> Iterator[tuple[int, dict]]:
        """Yields length and times of the causal case, shortest first."""
        once = {
            case: each["times"]
            for (case, who), each in self._memory.items()
            if who == contestant
        }
        for case in sorted({*self._times, *once}, key=lambda case: case.length):
            if case.kind == "causal" and not case.compiler:
                times = self.times(case, kind)
                if contestant in times:
                    yield case.length, times[contestant]
                elif not times and case in once:
                    yield case.length, once[case][kind]

    def contestants(self) -> list[str]:
        """Names all who were timed in the causal case."""
        return list(self.times(Case("causal", 1024), "forward"))

    def added_bytes(self, case: Case, contestant: str) -> int | None:
        """Returns what a training step adds to the process's memory at its peak."""
        found = self._memory.get((case, contestant))
        return found and found["added_bytes"]

    def process_bytes(self, case: Case, contestant: str) -> int | None:
        """Returns the whole process's peak memory in a training step."""
        found = self._memory.get((case, contestant))
        return found and found["process_bytes"]

    def memory_over_length(self, contestant: str) -> list[tuple[int, int]]:
        """Returns length and added bytes of the causal case, shortest first."""
        return sorted(
            (case.length, each["added_bytes"])
            for (case, name), each in self._memory.items()
            if name == contestant and case.kind == "causal" and not case.compiler
        )


def path(backend: str, device: str = "cpu") -> Path:
    """Returns where a backend's results on a kind of device are kept."""
    return FOLDER / (
        f"{backend}.json" if device == "cpu" else f"{backend}-{device}.json"
    )


def load() -> list[Results]:
    """Returns what is kept of CPUs, a backend after the other."""
    return [
        Results(backend, json.loads(path(backend).read_text()))
        for backend in info.BACKENDS
        if path(backend).exists()
    ]
