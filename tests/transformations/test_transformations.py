"""Every feature of the layer under every transformation of the backend's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import keras
import pytest

from tests.transformations.features import FEATURES
from tests.transformations.program import check

BACKEND = keras.backend.backend()
TRANSFORMATIONS = import_module(f"tests.transformations.{BACKEND}").TRANSFORMATIONS
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def errors_on_two_devices():
    """By feature; of a process that has two devices, which this one cannot have."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformations.shard_map_worker"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run(request):
    """What runs a cell of the table, and raises what goes wrong."""

    def here(feature, transformation):
        check(feature, TRANSFORMATIONS[transformation])

    def on_two_devices(feature, transformation):
        error = request.getfixturevalue("errors_on_two_devices")[feature]
        if error:
            raise RuntimeError(error)

    return lambda feature, transformation: (
        on_two_devices if transformation == "jax.shard_map" else here
    )(feature, transformation)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_under_a_transformation(run, feature, transformation):
    run(feature, transformation)
