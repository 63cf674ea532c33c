"""What there is to compute with: versions, backends, and attention's choices.

Keras fixes its backend when it is imported. Everything here that concerns another
backend therefore looks at the installed files only, or asks a process of its own.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys

import keras
import numpy

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.ops import planner

BACKENDS = ("tensorflow", "jax", "torch")
HEADS, WIDTH = 8, 64  # of the calls that the planner is asked about


class ChildProcessFailed(RuntimeError):
    """A process started by `run_under` ended with an error."""


def backend_version(backend: str) -> str | None:
    """Looks a backend up without importing it.

    Args:
        backend: String, the backend's name, which is also its module's.

    Returns:
        The installed version, or `None` where the backend is not installed.
    """
    spec = importlib.util.find_spec(backend)
    # No origin: a mere folder of that name, as an incomplete uninstall leaves it.
    if spec is None or spec.origin is None:
        return None
    try:
        return importlib.metadata.version(backend)
    except importlib.metadata.PackageNotFoundError:
        # The module can come in a package of another name: tensorflow-cpu, tf-nightly.
        packages = importlib.metadata.packages_distributions().get(backend)
        return importlib.metadata.version(packages[0]) if packages else "(no version)"


def install_hint(extra: str) -> str:
    """Returns the command that installs one of this package's extras."""
    return f'pip install "keras-mha[{extra}]"'


class MissingExtra(ImportError):
    """A package that only some commands need is not installed."""


def require(what: str, packages: dict[str, str], extra: str) -> None:
    """Raises `MissingExtra` if a package that a command needs is not installed.

    Args:
        what: String, what needs them, for the message.
        packages: Dictionary from modules to the names they are installed by.
        extra: String, the extra that installs them all.
    """
    missing = [
        package
        for module, package in packages.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        hint = install_hint(extra)
        raise MissingExtra(f"{what} needs {', '.join(missing)}, {hint} installs it")


def run_under(
    backend: str,
    module: str,
    *arguments: str,
    show: bool = False,
    one_thread: bool = True,
) -> str:
    """Runs `python -m module` in a new process, with Keras on another backend.

    Args:
        backend: String, the backend that the process runs on.
        module: String, the dotted name of the module to run.
        *arguments: Strings, the command line after the module.
        show: Boolean, whether the process writes to this one's standard output
            instead of having its own returned.
        one_thread: Boolean, whether numeric libraries keep to one thread unless
            `OMP_NUM_THREADS` says otherwise. On little work threads wait for one
            another, and crawl on a busy machine.

    Returns:
        What the process wrote to its standard output, empty with `show=True`.

    Raises:
        ChildProcessFailed: with what the process wrote to its standard error.
    """
    environment = {
        **({"OMP_NUM_THREADS": "1"} if one_thread else {}),
        **os.environ,
        "KERAS_BACKEND": backend,
        # The same modules as here, from an installation or a checkout alike, and none
        # of what lies in the folder that the user stands in (from Python 3.11 on).
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "PYTHONSAFEPATH": "1",
    }
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdout=None if show else subprocess.PIPE,
        # Held back: libraries report on themselves there when nothing is wrong.
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if process.returncode:
        raise ChildProcessFailed(
            f"{module} failed on the {backend} backend "
            f"(exit code {process.returncode}):\n{process.stderr.rstrip()}"
        )
    return process.stdout or ""


def attention_choices() -> dict[str, tuple[str, str]]:
    """Asks the planner what typical calls would run on, on the current backend.

    Returns:
        Dictionary from a description of the call to its implementation and the
        reason for it.
    """
    window = masks.Causal() & masks.SlidingWindow(512)
    bias = keras.KerasTensor((1, HEADS, 4096, 4096), "float32")
    plans = {
        "T=128": _plan(128),
        "T=4096": _plan(4096),
        "T=4096, bfloat16": _plan(4096, "bfloat16"),
        "T=4096, causal": _plan(4096, mask=masks.Causal()),
        "T=4096, window of 512": _plan(4096, mask=window),
        "T=4096, bias": _plan(4096, bias=bias),
        "T=4096, dropout": _plan(4096, dropout=0.1),
        "T=4096, scores": _plan(4096, return_scores=True),
    }
    return {call: (plan.implementation, plan.reason) for call, plan in plans.items()}


def _plan(length: int, dtype: str = "float32", **options) -> planner.Plan:
    tensor = keras.KerasTensor((1, length, HEADS, WIDTH), dtype)
    return planner.plan(AttentionCall(tensor, tensor, tensor, **options))


def device_kind() -> str:
    """Returns the kind of device that the planner takes calls to run on."""
    return backends.current().device_kind(keras.KerasTensor(()))


def devices() -> list[str]:
    """Returns the names of the devices that the current backend computes on."""
    try:
        return keras.distribution.list_devices()
    except AttributeError:  # Keras has no such list for PyTorch: where do arrays go?
        return [str(keras.ops.zeros(()).device)]


def report() -> str:
    """Describes this machine for a bug report, as plain text.

    Returns:
        String of several lines.
    """
    cores = os.cpu_count()
    lines = [
        _line("keras_mha", keras_mha.__version__),
        _line("keras", f"{keras.__version__}, on {keras.backend.backend()}"),
        _line("numpy", numpy.__version__),
        _line("python", f"{platform.python_version()}, {sys.implementation.name}"),
        _line("system", f"{platform.platform()}, {cores} cores"),
    ]
    for backend in BACKENDS:
        lines += ["", *_backend_lines(backend)]
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _backend_lines(backend: str) -> list[str]:
    version = backend_version(backend)
    if version is None:
        return [_line(backend, f"not installed: {install_hint(backend)}")]
    try:
        # Only the last line is ours: a library may greet on the standard output.
        found = json.loads(run_under(backend, __name__).splitlines()[-1])
    except ChildProcessFailed as error:
        return [_line(backend, f"{version}, but {error}")]
    lines = [
        _line(backend, version),
        _line("  devices", ", ".join(found["devices"])),
        f"  attention of {HEADS} heads of {WIDTH}, on a {found['kind'].upper()}",
    ]
    for call, (implementation, reason) in found["attention"].items():
        lines.append(f"    {call:<24}{implementation:<11}{reason}")
    return lines


if __name__ == "__main__":  # What `report` starts under each backend.
    print(
        json.dumps(
            {
                "devices": devices(),
                "kind": device_kind(),
                "attention": attention_choices(),
            }
        )
    )
