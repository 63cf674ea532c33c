"""Not slower than Keras's layer where people train: half types, thousands of tokens."""

from __future__ import annotations

import pytest

from keras_mha.bench import ON_ACCELERATOR, worker
from tests.accelerator.device import needs_device_itself

pytestmark = needs_device_itself

LENGTH, SECONDS = 2048, 10.0
LEAST = 0.97  # with the noise of a measurement


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}], ids=["plain", "dropout"])
def test_time_beside_keras(options):
    times = worker.measure(LENGTH, options, SECONDS, ON_ACCELERATOR)
    ratios = {kind: x["keras"] / x["keras_mha"] for kind, x in times.items()}
    assert min(ratios.values()) >= LEAST, (ratios, times)
