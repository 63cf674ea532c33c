"""Tiles within `jax.shard_map`: the numbers and gradients of one device."""

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
]


@pytest.fixture(scope="module")
def errors():
    """By case; of a process that has four devices, which this one cannot have."""
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
def test_numbers_are_those_of_one_device(errors, kind):
    assert errors[kind] < 2e-5


def test_every_case_is_looked_at(errors):
    assert sorted(errors) == sorted(KINDS)
    assert keras.backend.backend() == "jax"
