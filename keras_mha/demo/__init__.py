"""The demo: a model of handwritten digits, trained once, loaded everywhere.

This module only conducts. Keras fixes its backend when it is imported, so training and
each evaluation are processes of their own (`train`, `evaluate`), which hand back what
they found as a file.
"""

import sys
import tempfile
from pathlib import Path

from keras_mha import info

EPOCHS = 8
REQUIREMENTS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def run(backend: str, epochs: int, output: Path, seed: int) -> int:
    """Trains, saves, loads the file under every backend and prints the comparison.

    Args:
        backend: String, the installed backend to train on.
        epochs: Integer, the passes over the training digits.
        output: Path, the folder for `digits.keras` and `attention.png`.
        seed: Integer, fixes the initial weights and the order of the digits.

    Returns:
        The exit code: 0, or 1 when the file failed to load under some backend.

    Raises:
        MissingExtra: if the demo's requirements are not installed.
        ChildProcessFailed: if the training failed.
    """
    info.require("the demo", REQUIREMENTS, "demo")
    from keras_mha.demo import table

    output.mkdir(parents=True, exist_ok=True)
    model, picture = output / "digits.keras", output / "attention.png"
    print(f"Training on {backend}, {info.backend_version(backend)}", flush=True)
    trained = _child(backend, "train", model, picture, epochs, seed, show=True)
    print(f"Trained in {trained.seconds:.0f} s, loading {model}", flush=True)
    outcomes = {name: _evaluate(name, model) for name in info.BACKENDS}
    table.show(outcomes, backend, trained)
    print(f"The model: {model}\nWhat it looked at: {picture}")
    failures = [o for o in outcomes.values() if isinstance(o, info.ChildProcessFailed)]
    for failure in failures:
        print(f"keras-mha: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _evaluate(backend: str, model: Path):
    """Returns the `Result`, the failure, or `None` where there is no such backend."""
    if info.backend_version(backend) is None:
        return None
    try:
        return _child(backend, "evaluate", model)
    except info.ChildProcessFailed as failure:
        return failure


def _child(backend: str, module: str, *arguments, show: bool = False):
    from keras_mha.demo.results import Result

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.npz"
        arguments = [str(argument) for argument in (result, *arguments)]
        info.run_under(backend, f"{__name__}.{module}", *arguments, show=show)
        return Result.load(result)
