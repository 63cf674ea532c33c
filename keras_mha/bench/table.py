"""What `keras-mha bench` shows: a progress bar, then a table."""

from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table


def progress() -> Progress:
    """Returns a progress bar that says what is being measured."""
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def show(found: dict[str, dict[str, Any]]) -> None:
    """Prints how long both layers took.

    Args:
        found: Dictionary from backend to what the worker printed.
    """
    machine: dict[str, Any] = {}
    for each in found.values():
        machine |= each["machine"]
    table = Table(
        title="keras_mha.MultiHeadAttention beside keras.layers.MultiHeadAttention",
        caption="milliseconds a batch: Keras's / ours, and how many times faster",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for name in ("backend", "case"):
        table.add_column(name)
    for name in ("predict", "", "train", ""):
        table.add_column(name, justify="right")
    for backend, measured in found.items():
        for case, times in measured["times"].items():
            predict, train = _cells(times["predict"]), _cells(times["train"])
            table.add_row(backend, case, *predict, *train)
    console = Console()
    console.print(table)
    console.print(
        f"\n{machine['processor']}, {machine['cores']} cores. One layer of 8 heads of "
        "64, causal; medians of calls in turns.",
        highlight=False,
    )
    for backend, measured in found.items():
        console.print(f"{backend}: {_setting(measured['machine'])}", highlight=False)


def _setting(machine: dict[str, Any]) -> str:
    where = f"{machine['device']}, batch of {machine['batch']}, {machine['dtype']}"
    return where if machine["leaves_device"] else f"{where}, predict by its loss"


def _cells(times: dict[str, float]) -> tuple[str, str]:
    theirs, ours = times["keras"], times["keras_mha"]
    return f"{theirs * 1e3:.1f} / {ours * 1e3:.1f}", f"{theirs / ours:.1f}x"
