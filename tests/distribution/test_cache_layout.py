"""Decoding with a cache of which each device has its heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
FEATURES = "8 key heads", "4 key heads", "2 key heads"
MESHES = {"2x4": (2, 4), "1x8": (1, 8)}


@pytest.fixture(scope="module")
def found():
    """What a process of eight devices of JAX's says."""
    pytest.importorskip("jax")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distribution.cache_layout_worker"],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if "has no attribute 'spmd_mode'" in done.stderr:
        pytest.skip("this version of Keras distributes nothing under this JAX")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("feature", FEATURES)
def test_decoding_is_that_of_one_device(found, feature, mesh):
    """Of a prompt with padding and ten tokens more."""
    assert found[feature][mesh]["error"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_device_has_its_rows_and_its_heads_of_the_cache(found, feature, mesh):
    """All heads, where they are too few for each device to have one."""
    rows, columns = MESHES[mesh]
    heads = int(feature[0])
    heads = heads // columns if heads % columns == 0 else heads
    slots = 6 if feature == "2 key heads" else 15  # of its window
    expected = {name: [4 // rows, slots, heads, 4] for name in ("key", "value")}
    expected["length"] = [4 // rows]
    assert found[feature][mesh]["before"] == expected
    assert found[feature][mesh]["after"] == expected


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_token_costs_the_sum_of_the_output_projection_alone(found, feature, mesh):
    assert found[feature][mesh]["sent"] == {"all-reduce": 1}
