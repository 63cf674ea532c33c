"""What a measurement ran on, for the record."""

import os
import platform
from pathlib import Path

import keras

from keras_mha import info


def description(backend: str) -> dict[str, str | int | float]:
    """Describes the machine and the versions, with nothing that names its owner.

    Args:
        backend: String, the backend that the measurement ran on.

    Returns:
        Dictionary of plain values, for JSON.
    """
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
        "keras": keras.__version__,
        backend: info.backend_version(backend) or "",
    }


def processor() -> str:
    """Returns the processor's name, as well as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Returns how many cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def memory_gib() -> float:
    """Returns the machine's memory in GiB, 0 where the system does not say."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0.0
    return round(pages / 2**30, 1)
