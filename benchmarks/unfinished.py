"""Which parts of the results are of a run that was stopped, and go on in the next.

A part, such as `"jax grid"`, is noted when its results are begun anew, and forgotten
when all of the run that began it is done. What there is of a part that is noted was
measured by this run; what there is of any other, by an earlier one.
"""

import json
from collections.abc import Iterable

from benchmarks.results import FOLDER

PATH = FOLDER / "unfinished.json"


def parts() -> list[str]:
    """Returns the parts that were begun in a run that was stopped."""
    return json.loads(PATH.read_text()) if PATH.exists() else []


def note(begun: Iterable[str]) -> None:
    """Notes parts as begun, once nothing older is left of them."""
    _keep([*parts(), *begun])


def forget(finished: Iterable[str]) -> None:
    """Lets parts begin anew the next time."""
    dropped = set(finished)
    _keep([part for part in parts() if part not in dropped])


def _keep(begun: list[str]) -> None:
    if begun:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        new = PATH.with_suffix(".new")
        new.write_text(json.dumps(begun) + "\n")
        new.replace(PATH)  # all of it or nothing
    else:
        PATH.unlink(missing_ok=True)
