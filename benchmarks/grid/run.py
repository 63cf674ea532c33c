"""Has the grid measured: what is missing, in a process for each width."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from benchmarks import processes, unfinished
from benchmarks.grid import cells, kept, thresholds

WORKER = "benchmarks.grid.worker"
WANTED: dict[str, Callable[[str], list]] = {
    "grid": cells.cells,
    "thresholds": thresholds.points,
}
Measure = Callable[[str, str, list], Iterator[dict[str, Any]]]


def measure(
    part: str, backend: str, names: list[str], worker: Measure | None = None
) -> None:
    """Measures what is missing of a part and keeps it, a line at once.

    Args:
        part: String, `"grid"` or `"thresholds"`.
        backend: String, the backend.
        names: List of strings. Only what one of them is a part of the name of is
            measured, and that again; all else is kept. Empty for all that is missing.
        worker: What measures: `worker(part, backend, wanted)` yields its lines. A
            process of its own unless given.
    """
    found = kept.kept(part, backend)
    if not names and f"{backend} {part}" not in unfinished.parts():
        found.begin_anew()
        unfinished.note([f"{backend} {part}"])
    wanted = WANTED[part](backend)
    if names:
        missing = [x for x in wanted if any(name in x.name for name in names)]
    else:
        missing = [x for x in wanted if x.name not in found.found]
    left = TimeLeft(missing)
    with processes.progress("{task.fields[left]}") as progress:
        done = 0 if names else len(wanted) - len(missing)
        total = len(missing) if names else len(wanted)
        task = progress.add_task(
            f"{backend}: {part}", completed=done, total=total, left=left.text()
        )
        # A process for each width: what one has compiled is of no use to another.
        for _, group in groupby(missing, key=_process):
            for line in (worker or _worker)(part, backend, list(group)):
                if "machine" in line:
                    found.set_machine(line["machine"])
                elif "started" in line:
                    progress.update(
                        task, description=f"{backend}: {part}, {line['started']}"
                    )
                else:
                    found.add(line)
                    left.count(line["name"])
                    progress.update(task, advance=1, left=left.text())


def _process(wanted: Any) -> tuple[int, int] | None:
    return (wanted.heads, wanted.width) if isinstance(wanted, cells.Cell) else None


def _worker(part: str, backend: str, wanted: list) -> Iterator[dict[str, Any]]:
    given = json.dumps([each.config for each in wanted])
    return processes.lines(backend, WORKER, part, given=given)


class TimeLeft:
    """How long the rest will take, from how long it took so far.

    Args:
        wanted: All that is to be measured, each with a `name` and a `cost`.
        clock: Returns the seconds now.
    """

    def __init__(self, wanted: list, clock: Callable[[], float] = time.monotonic):
        self._costs = {each.name: each.cost for each in wanted}
        self._done = 0.0
        self._clock, self._begin = clock, clock()

    def count(self, name: str) -> None:
        """Counts something as measured."""
        self._done += self._costs.pop(name, 0.0)

    def seconds(self) -> float | None:
        """Returns the seconds that are left, `None` before anything was measured."""
        if not self._done:
            return None
        passed = self._clock() - self._begin
        return passed / self._done * sum(self._costs.values())

    def text(self) -> str:
        """Says it in words."""
        seconds = self.seconds()
        if seconds is None:
            return ""
        minutes = round(seconds / 60)
        return f"about {minutes} min left" if minutes else "a minute left at most"
