"""Which kernels there are to be had on a GPU: the machine's, or another's.

A program may be lowered for a GPU on a machine that has none (`jax.export`). What will
run it cannot be asked. Then the least is assumed that JAX itself, in the versions that
these kernels are for, asks of a machine with a GPU: an Ampere, and cuDNN 9.2 or later.
On a machine that has less such a program does not compile; lowered there, it has tiles.
"""

import jax

# Windows came with 9.2; JAX 0.10 runs on no version before 9.8.
_OLDEST = 90200

# Heads may be wider on Hoppers only, in every version of cuDNN from the oldest on.
_WIDEST, _WIDEST_ON_HOPPER = 128, 256


def refusal() -> str | None:
    """Returns why this machine's GPU has no such kernel, or `None` if it has, or if
    there is no GPU to ask."""
    if _gpu() is None:
        return None
    if (too_old := refusal_of_capability()) is not None:
        return too_old
    version = _version()
    if version is None:
        return "no cuDNN was found"
    if version < _OLDEST:
        return f"cuDNN's kernel is taken from version 9.2 on, and here is {version}"
    return None


def refusal_of_capability() -> str | None:
    """Returns why this machine's GPU is too old for kernels of half types, if it is."""
    device = _gpu()
    if device is None or _capability(device) >= (8, 0):
        return None
    return "fused kernels are for GPUs from compute capability 8.0 on"


def widest() -> int:
    """Returns how wide heads can be."""
    device = _gpu()
    on_hopper = device is not None and _capability(device)[0] == 9
    return _WIDEST_ON_HOPPER if on_hopper else _WIDEST


def _gpu():
    """Returns an NVIDIA GPU that programs of this process run on, if there is one."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    # AMD's are called so too.
    is_nvidia = "cuda" in device.client.platform_version.lower()
    return device if is_nvidia else None


def _capability(device):
    return tuple(int(number) for number in device.compute_capability.split("."))


def _version():
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else cuda_versions.cudnn_get_version()
