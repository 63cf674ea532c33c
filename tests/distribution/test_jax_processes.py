"""Several processes of JAX's train one model: the losses of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tests.distribution.jax_processes_worker"]


def free_address():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture(scope="module")
def found():
    """What one device says, and each of two processes of two devices."""
    pytest.importorskip("jax")
    address = free_address()
    processes = [
        subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (["one"], [address, "0"], [address, "1"])
    ]
    try:
        return [printed(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def printed(process):
    output, errors = process.communicate(timeout=300)
    if "has no attribute 'spmd_mode'" in errors:
        pytest.skip("this version of Keras distributes nothing under this JAX")
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(
    ("shared", "feature", "heads_held"),
    [
        ("data", "window", 4),
        ("tensor", "tiles", 2),
        ("tensor across processes", "window", 1),
    ],
)
def test_losses_are_those_of_one_device(found, shared, feature, heads_held):
    """With relative positions, padding and dropout."""
    one_device, *processes = found
    expected = one_device[feature]["losses"]
    assert expected[-1] < expected[0]
    for process in processes:
        np.testing.assert_allclose(process[shared]["losses"], expected, rtol=1e-5)
        assert process[shared]["heads held"] == heads_held
