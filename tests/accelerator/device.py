"""Which device is tested."""

from __future__ import annotations

import os

import keras
import pytest

from keras_mha.kernels import backends

BACKEND = keras.backend.backend()
KIND = backends.current().device_kind(keras.ops.zeros(()))
IS_FORCED = os.environ.get("KERAS_MHA_ACCELERATOR") == "cpu"

needs_accelerator = pytest.mark.skipif(
    KIND not in ("gpu", "tpu") and not IS_FORCED,
    reason=f"{BACKEND} sees neither an NVIDIA GPU nor a TPU",
)
needs_device_itself = pytest.mark.skipif(
    KIND not in ("gpu", "tpu"),
    reason=f"{BACKEND} sees neither an NVIDIA GPU nor a TPU, and a CPU cannot tell",
)


def finish(outputs):
    """Waits until a device has computed: a number of each of the outputs is read."""
    for x in outputs if isinstance(outputs, list | tuple) else [outputs]:
        keras.ops.convert_to_numpy(keras.ops.ravel(x)[:1])
