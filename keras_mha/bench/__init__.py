"""The short benchmark: our layer beside Keras's, on the user's own machine.

This module only conducts. Each backend is measured in a process of its own (`worker`),
since Keras fixes its backend when it is imported.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_mha import info

SECONDS = 1.0  # how long each pair of layers is timed, predicting and training


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        length: Integer, the sequence length.
        options: Dictionary, arguments of both layers.
    """

    length: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """How the cases are run on a kind of device.

    Args:
        batch: Integer, the number of sequences.
        dtype: String, the dtype policy of the layers.
        leaves_device: Boolean, whether inputs come from the host and outputs go there,
            as in `predict`. To and from a GPU that takes longer than to attend.
    """

    batch: int = 1
    dtype: str = "float32"
    leaves_device: bool = True


ON_CPU, ON_ACCELERATOR = Setting(), Setting(8, "mixed_bfloat16", leaves_device=False)

CASES = {
    "16 tokens": Case(16),
    "2048 tokens": Case(2048),
    "2048 tokens, dropout=0.1": Case(2048, {"dropout": 0.1}),
    "2048 tokens, sliding_window=256": Case(2048, {"sliding_window": 256}),
}


def run(backends: Sequence[str], seconds: float = SECONDS) -> int:
    """Measures every case under each backend and prints one table.

    Args:
        backends: Sequence of strings, installed backends.
        seconds: Float, how long to time each pair of layers.

    Returns:
        The exit code, 0.

    Raises:
        MissingExtra: if rich is not installed.
        ChildProcessFailed: if a measurement failed.
    """
    info.require("the benchmark", {"rich": "rich"}, "bench")
    from keras_mha.bench import table

    found = {}
    with table.progress() as progress:
        task = progress.add_task("", total=len(backends))
        for backend in backends:
            progress.update(task, description=backend)
            output = info.run_under(
                backend, f"{__name__}.worker", str(seconds), one_thread=False
            )
            found[backend] = json.loads(output.splitlines()[-1])
            progress.advance(task)
    table.show(found)
    return 0
