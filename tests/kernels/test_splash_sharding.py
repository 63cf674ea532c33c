"""Splash attention on eight devices: each has its part, and gathers nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
# Of a batch of 8 and 8 heads, what a device has; JAX leaves a batch of 1 out.
PARTS = {
    "data": "8x",
    "own layouts": "4x2x",
    "one device under a distribution": "8x8x",
    "one device": "8x8x",
    "within shard_map": "8x",
}
IN_TILES = (
    *("nothing says how", "others' layouts", "other devices", "few key heads"),
    "within shard_map that checks",
)
SENDS = {"data": ["all-reduce"], "own layouts": ["all-reduce"]}


@pytest.fixture(scope="module")
def found():
    """What a process of eight devices of JAX's says."""
    pytest.importorskip("jax")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.splash_sharding_worker"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("this version of jax has another splash attention")
    return found


@pytest.mark.parametrize("name", [*SENDS, "one device under a distribution"])
def test_numbers_are_those_of_one_device(found, name):
    assert found["numbers"][name]["error"] < 1e-5
    # What is summed is the gradient of the sinks, which all rows of the batch share.
    assert found["numbers"][name]["sends"] == SENDS.get(name, [])


@pytest.mark.parametrize("name", PARTS)
def test_each_device_runs_the_kernel_for_its_part(found, name):
    assert found["programs"][name] == [3, f"{PARTS[name]}128x64x"]


@pytest.mark.parametrize("name", IN_TILES)
def test_tiles_run_where_the_kernel_cannot_be_shared(found, name):
    assert found["programs"][name] == [0, None]


def test_every_program_is_looked_at(found):
    assert sorted(found["programs"]) == sorted([*PARTS, *IN_TILES])
