"""The demo's table: one file under every backend."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keras_mha.demo.results import Result
from keras_mha.info import backend_version, install_hint


def show(
    outcomes: dict[str, Result | Exception | None], trained_on: str, trained: Result
) -> None:
    """Prints what became of the file under each backend.

    Args:
        outcomes: Dictionary from the backend's name to its result, to the error
            that it met, or to `None` where it is not installed.
        trained_on: String, the backend that trained the model.
        trained: The result of the model as trained, before it was saved.
    """
    table = Table(
        title=f"One file, trained on {trained_on}, under every backend",
        caption=f"{len(trained.logits)} test digits; seconds to load and classify",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("backend")
    table.add_column("version", overflow="fold")
    table.add_column("test\naccuracy", justify="right")
    table.add_column("largest\ndifference", justify="right")
    table.add_column("seconds", justify="right")
    for backend, outcome in outcomes.items():
        # Text, as rich would take the brackets of "keras-mha[jax]" for a style.
        table.add_row(*map(Text, _row(backend, outcome, trained)))
    Console().print(table)


def _row(
    backend: str, outcome: Result | Exception | None, trained: Result
) -> list[str]:
    if outcome is None:
        return [backend, f"not installed\n{install_hint(backend)}", "", "", ""]
    if isinstance(outcome, Exception):
        return [backend, f"{backend_version(backend)}\nfailed, see below", "", "", ""]
    difference = np.abs(outcome.logits - trained.logits).max()
    return [
        backend,
        backend_version(backend),
        f"{outcome.accuracy:.1%}",
        f"{difference:.1e}",
        f"{outcome.seconds:.1f}",
    ]
