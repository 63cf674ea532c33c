"""The demo's table: one file under every backend."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keras_mha import info
from keras_mha.demo.results import Result


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
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # so that it fits in 80 columns
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("backend")
    table.add_column("version", overflow="fold")
    table.add_column("test\naccuracy", justify="right")
    table.add_column("largest\ndifference", justify="right")
    table.add_column("seconds", justify="right")
    for backend, outcome in outcomes.items():
        # Text, as rich would take the brackets of "keras-mha[jax]" for a style.
        table.add_row(*map(Text, _row(backend, outcome, trained)))
    console = Console()
    console.print(table)
    console.print(
        f"\n{len(trained.logits)} test digits. Difference: of the logits from those of "
        f"{trained_on} after training. Seconds: to load and to classify.",
        highlight=False,
    )


def _row(
    backend: str, outcome: Result | Exception | None, trained: Result
) -> list[str]:
    if outcome is None:
        return [backend, f"not installed\n{info.install_hint(backend)}", "", "", ""]
    version = info.backend_version(backend)
    if isinstance(outcome, Exception):
        return [backend, f"{version}\nfailed, see below", "", "", ""]
    difference = np.abs(outcome.logits - trained.logits).max()
    return [
        backend,
        version,
        f"{outcome.accuracy:.1%}",
        f"{difference:.1e}",
        f"{outcome.seconds:.1f}",
    ]
