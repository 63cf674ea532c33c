"""Every feature of the layer under every transformation of the backend's."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import keras
import pytest

from tests.transformations import table
from tests.transformations.cells import IMPOSSIBLE, NOT_YET, Refusal
from tests.transformations.features import COLUMNS, FEATURES
from tests.transformations.program import (
    check,
    differences,
    expected,
    largest_error,
)

BACKEND = keras.backend.backend()
TRANSFORMATIONS = import_module(f"tests.transformations.{BACKEND}").TRANSFORMATIONS
ROOT = Path(__file__).resolve().parents[2]
SHARDED = "jax.shard_map"


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

    def anywhere(feature, transformation):
        run = on_two_devices if transformation == SHARDED else here
        run(feature, transformation)

    return anywhere


def cells():
    """Those that share a process stand together, so that one of pytest's workers has
    them all and starts it once; of the others those of a feature do."""
    pairs = list(itertools.product(FEATURES, TRANSFORMATIONS))
    for feature, transformation in sorted(pairs, key=lambda x: x[1] != SHARDED):
        fault = NOT_YET.get((feature, transformation))
        marks = [pytest.mark.xfail(reason=fault.reason)] if fault else []
        yield pytest.param(feature, transformation, marks=marks)


@pytest.mark.parametrize(("feature", "transformation"), cells())
def test_a_cell_is_right_or_an_error_by_name(run, feature, transformation):
    refusal = IMPOSSIBLE.get((feature, transformation))
    if refusal is None:
        run(feature, transformation)
        return
    with pytest.raises(Exception, match=re.escape(refusal.error)):
        run(feature, transformation)


# Of 8 bits differences say nothing, and a step away from 0 changes Keras's mask.
SMOOTH = [name for name in FEATURES if name not in ("bfloat16", "Keras mask")]


@pytest.mark.parametrize("gives", ["tangents", "second"])
@pytest.mark.parametrize("feature", SMOOTH)
def test_the_derivatives_expected_are_those_of_differences(feature, gives):
    """What the transformations are held to is itself held to first derivatives and
    outputs, at two places nearby."""
    wanted = expected(feature, gives, False)
    found = differences(feature, gives)
    assert largest_error(found, wanted) < 0.01


def test_every_exception_is_a_cell():
    names = {name for _, name in table.transformations()}
    for feature, transformation in IMPOSSIBLE.keys() | NOT_YET.keys():
        assert feature in FEATURES
        assert transformation in names


def test_the_guide_lists_the_errors():
    guide = " ".join((ROOT / "docs/guide.md").read_text("utf-8").split())
    assert all(refusal.error in guide for refusal in IMPOSSIBLE.values())


@pytest.mark.parametrize(
    ("readme", "chinese"), [("README.md", False), ("README.zh-CN.md", True)]
)
def test_the_readme_holds_what_is_tested(readme, chinese):
    """To write it: `python -m tests.transformations.table`."""
    block = f"{table.BEGIN}\n{table.section(chinese)}\n{table.END}"
    assert block in (ROOT / readme).read_text("utf-8")


def test_a_cell_of_the_readme_that_is_an_error_has_no_mark(monkeypatch):
    refusal = Refusal("an error", "a note on it", "说明")
    monkeypatch.setattr(table, "IMPOSSIBLE", {("dropout", "jax.jvp"): refusal})
    monkeypatch.setattr(table, "NOT_YET", {("ALiBi", "jax.jvp"): refusal})
    (row,) = (x for x in table.section().splitlines() if "`jax.jvp`" in x)
    marks = [cell.strip() for cell in row.strip("|").split("|")[1:]]
    found = dict(zip(COLUMNS, marks, strict=True))
    assert found["dropout"] == "(1)" and found["positions"] == "✓ (1)"
    assert {x for name, x in found.items() if name not in ("dropout", "positions")} == {
        "✓"
    }
    assert "1. a note on it" in table.section()
