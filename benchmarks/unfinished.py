"""Which parts of the results are of a run that was stopped, and go on in the next.

A part, such as `"jax grid"`, is noted when its results are begun anew, and forgotten when
all of the run that began it is done. What is there of a part that is noted was measured
by this run; of any other by an earlier one.
"""

import json
from collections.abc import Iterable

from benchmarks.results import FOLDER

PATH = FOLDER / "unfinished.json"


def goes_on(part: str) -> bool:
    """Whether a part was begun in a run that was stopped; notes it as begun."""
    begun = _begun()
    if part not in begun:
        _keep([*begun, part])
    return part in begun


def forget(parts: Iterable[str]) -> None:
    """Lets parts begin anew the next time."""
    dropped = set(parts)
    _keep([part for part in _begun() if part not in dropped])


def _begun() -> list[str]:
    return json.loads(PATH.read_text()) if PATH.exists() else []


def _keep(parts: list[str]) -> None:
    if parts:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        new = PATH.with_suffix(".new")
        new.write_text(json.dumps(parts) + "\n")
        new.replace(PATH)  # all of it or nothing
    else:
        PATH.unlink(missing_ok=True)
