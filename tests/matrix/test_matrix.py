"""An archive written under each backend, loaded under each: the same numbers.

The processes are started here, one a backend, since a process has one backend only.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BACKENDS = ("tensorflow", "jax", "torch")
ROOT = Path(__file__).parent.parent.parent


def run_on_all_backends(task, folder):
    processes = {
        backend: subprocess.Popen(
            [sys.executable, "-m", "tests.matrix.worker", task, str(folder)],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": backend},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for backend in BACKENDS
    }
    for backend, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{task} under {backend} failed:\n{output}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    run_on_all_backends("write", folder)
    run_on_all_backends("read", folder)
    return folder


@pytest.mark.parametrize("reader", BACKENDS)
@pytest.mark.parametrize("writer", BACKENDS)
class TestAnArchive:
    def test_gives_the_same_outputs(self, folder, writer, reader):
        kept = np.load(folder / f"{writer}-kept.npz")
        loaded = np.load(folder / f"{writer}-by-{reader}.npz")
        assert np.abs(kept["outputs"]).max() > 0.1
        np.testing.assert_allclose(loaded["outputs"], kept["outputs"], atol=1e-5)

    def test_trains_on_with_the_optimizers_state(self, folder, writer, reader):
        kept = np.load(folder / f"{writer}-kept.npz")
        loaded = np.load(folder / f"{writer}-by-{reader}.npz")
        assert kept["losses"][1] < kept["losses"][0]
        np.testing.assert_allclose(loaded["losses"], kept["losses"], atol=1e-4)


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_each_position_trains_alike(folder, position):
    trained = [
        np.load(folder / f"trained-by-{each}.npz")[position] for each in BACKENDS
    ]
    assert np.abs(trained[0]).max() > 0.1
    for other in trained[1:]:
        np.testing.assert_allclose(other, trained[0], atol=1e-5)
