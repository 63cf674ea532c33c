"""Training under TensorFlow's strategies: the numbers of one device."""

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
WORKER = "tests.distribution.tensorflow_strategies_worker"


def free_addresses(count):
    """Returns addresses of this machine that nothing listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a process of two devices left there, and two processes of one."""
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("strategies")
    addresses = free_addresses(2)
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    configs = [{"cluster": {"worker": addresses}, "task": task} for task in tasks]
    runs = [("mirrored", {})]
    runs += [("workers", {"TF_CONFIG": json.dumps(config)}) for config in configs]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", WORKER, mode, str(folder)],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for mode, environment in runs
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.parametrize("case", ["masks", "dropout", "tiles"])
@pytest.mark.parametrize("strategy", ["mirrored", "worker 0", "worker 1"])
def test_training_is_that_of_one_device(folder, strategy, case):
    """Also with dropout: each replica drops what one device would of its rows."""
    expected = np.load(folder / f"one {case}.npz")
    found = np.load(folder / f"{strategy} {case}.npz")
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
        )
    assert expected["losses"][-1] < expected["losses"][0]


def test_dropout_was_at_work(folder):
    losses = [np.load(folder / f"one {x}.npz")["losses"] for x in ("masks", "dropout")]
    assert np.abs(losses[0] - losses[1]).max() > 1e-3
