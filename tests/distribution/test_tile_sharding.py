"""Attention in tiles over eight devices: each does its share, and gathers nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
FEATURES = (
    *("plain", "causal", "padding", "window", "segments", "bias", "ALiBi", "dropout"),
    *("sink and cap", "4 key heads", "2 key heads", "layer"),
)
CASES = [
    *(("2 x 4", feature) for feature in FEATURES),
    *(
        (mesh, feature)
        for mesh in ("8 x 1", "1 x 8")
        for feature in ("causal", "padding", "layer")
    ),
]


@pytest.fixture(scope="module")
def found():
    """What a process of eight devices of JAX's says."""
    pytest.importorskip("jax")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.distribution.tile_sharding_worker"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("mesh", "feature"), CASES)
def test_numbers_are_those_of_one_device(found, mesh, feature):
    assert found[mesh][feature]["error"] < 1e-5


@pytest.mark.parametrize(("mesh", "feature"), CASES)
def test_each_device_does_its_share(found, mesh, feature):
    assert found[mesh][feature]["share"] <= 1.1 / 8


@pytest.mark.parametrize(
    ("mesh", "feature"), [case for case in CASES if case[1] != "2 key heads"]
)
def test_nothing_is_gathered(found, mesh, feature):
    assert set(found[mesh][feature]["times"]) <= {"all-reduce"}


def test_of_key_heads_that_all_devices_have_gradients_alone_are_gathered(found):
    batch, length, heads, width = 8, 160, 2, 16
    gradient = 4 * (batch // 2) * length * heads * width
    assert found["2 x 4"]["2 key heads"]["times"]["all-gather"] == 2
    assert found["2 x 4"]["2 key heads"]["sent"]["all-gather"] == 2 * gradient
