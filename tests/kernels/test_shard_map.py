"""Attention within `jax.shard_map` and on explicit axes: the numbers of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.helpers import only_jax

pytestmark = only_jax
WORKER = Path(__file__).with_name("shard_map_worker.py")
ROOT = WORKER.parents[2]
KINDS = [
    *("causal, one axis", "causal, two axes", "causal, unchecked"),
    *("plain, one axis", "window, one axis", "padding, one axis"),
    *("segments, one axis", "bias, one axis", "ALiBi, one axis"),
    "grouped heads, sink and cap, one axis",
    *("dropout, one axis", "dropout, two axes", "dropout, reference"),
    "dropout, rows along both axes",
    *("vmap, within", "vmap, around"),
    "derivatives, two axes",
    *("explicit axes, rows and heads", "explicit axes, width"),
]
# What says to JAX that tensors vary, so that each device drops other weights.
VARYING = ["heads and rows", "queries", "rows, pmap, own state"]
NOT_KNOWN = ["rows, unchecked", "rows, pmap"]


@pytest.fixture(scope="module")
def found():
    """Of a process that has four devices, which this one cannot have."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_one_device(found, kind):
    assert found["errors"][kind] < 2e-5


@pytest.mark.parametrize("kind", VARYING + NOT_KNOWN)
def test_every_implementation_drops_the_same_weights(found, kind):
    assert found["errors"][f"dropped, {kind}"] < 2e-5


@pytest.mark.parametrize("kind", VARYING)
def test_every_device_drops_other_weights(found, kind):
    assert found["agreements"][kind] < 0.6  # of what is dropped by half


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_devices_drop_the_same_weights_where_jax_does_not_say_what_varies(found, kind):
    assert found["agreements"][kind] == 1  # as the guide says


def test_every_case_is_looked_at(found):
    kinds = VARYING + NOT_KNOWN
    assert sorted(found["errors"]) == sorted(KINDS + [f"dropped, {x}" for x in kinds])
    assert sorted(found["agreements"]) == sorted(kinds)
    assert keras.backend.backend() == "jax"
