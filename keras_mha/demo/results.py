"""What the demo's processes tell each other."""

from dataclasses import asdict, dataclass
from os import PathLike

import numpy as np


@dataclass
class Result:
    """A model's answers on the test digits.

    Args:
        logits: Array of shape `(digits, 10)`.
        accuracy: Float, the share of the test digits classified rightly.
        seconds: Float, what it took to get there.
    """

    logits: np.ndarray
    accuracy: float
    seconds: float

    def save(self, path: str | PathLike) -> None:
        np.savez(path, **asdict(self))

    @classmethod
    def load(cls, path: str | PathLike) -> "Result":
        with np.load(path) as file:
            return cls(file["logits"], float(file["accuracy"]), float(file["seconds"]))
