"""Devices share the heads of attention layers: one device's numbers, on eight."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.distribution import layout_map
from keras_mha.layers.building import building

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
FEATURES = "plain", "2 key heads", "4 key heads", "RoPE-Mixed", "LoRA", "int8"


def run(*command):
    """Returns what a process of JAX's printed."""
    pytest.importorskip("jax")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "has no attribute 'spmd_mode'" in done.stderr:
        pytest.skip("this version of Keras distributes nothing under this JAX")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found():
    """What a process of eight devices of JAX's says of all features."""
    return json.loads(
        run("-m", "tests.distribution.layout_map_worker").splitlines()[-1]
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_training_and_predictions_are_those_of_one_device(found, feature):
    found = found["features"][feature]
    one_device, eight = found["losses"]
    np.testing.assert_allclose(eight, one_device, rtol=1e-5)
    assert one_device[-1] < one_device[0]
    # Rounding to 8 bits falls to the other side where numbers differ in the last digit.
    assert found["error"] < (0.02 if feature == "int8" else 1e-4)


@pytest.mark.parametrize("feature", FEATURES)
def test_an_archive_comes_back_in_the_same_layouts(found, feature):
    found = found["features"][feature]
    assert found["error once loaded"] < 1e-5
    # What is shared is read before its layers, outside of them.
    before, after = (
        {path.removeprefix("attention/"): axes for path, axes in found[name].items()}
        for name in ("layouts", "layouts once loaded")
    )
    assert after == {path: before[path] for path in after}
    # LoRA's are merged into the kernels of an archive.
    assert {path for path in before if "lora" not in path} == set(after)


def shared(layouts, path):
    """The mesh's axis by axis of a variable, without what is whole behind."""
    axes = layouts[f"attention/{path}"]
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return axes


def test_heads_are_shared_and_all_else_is_whole(found):
    layouts = found["features"]["plain"]["layouts"]
    for name in ("query", "key", "value"):
        assert shared(layouts, f"{name}/kernel") == [None, "model"]
        assert shared(layouts, f"{name}/bias") == ["model"]
    assert shared(layouts, "attention_output/kernel") == ["model"]
    assert shared(layouts, "attention_output/bias") == []
    # Layers of a user's own that have the names of projections.
    for name in ("query/kernel", "query/bias", "key/kernel"):
        assert set(layouts[name]) <= {None}
    assert layouts["dense/kernel"] == ["model", None]  # the user's own layout


def test_key_heads_that_are_too_few_are_whole_on_each_device(found):
    layouts = found["features"]["2 key heads"]["layouts"]
    for name in ("key/kernel", "key/bias", "value/kernel", "memory_key"):
        assert shared(layouts, name) == []
    for name in ("query/kernel", "gate/kernel"):
        assert shared(layouts, name) == [None, "model"]
    assert shared(layouts, "sink") == ["model"]
    assert shared(layouts, "query_norm_scale") == []


def test_what_belongs_to_heads_goes_with_them(found):
    layouts = found["features"]["4 key heads"]["layouts"]
    for name in ("memory_key", "memory_value", "relative_position_bias/table"):
        assert shared(layouts, name) == [None, "model"]
    assert shared(layouts, "talking_heads_pre") == []
    layouts = found["features"]["RoPE-Mixed"]["layouts"]
    (frequencies,) = (x for x in layouts if x.endswith("/frequencies"))
    assert layouts[frequencies][1] == "model"
    layouts = found["features"]["LoRA"]["layouts"]
    assert shared(layouts, "query/lora_kernel_a") == [None, "model"]
    assert shared(layouts, "attention_output/lora_kernel_a") == ["model"]
    assert shared(layouts, "query/lora_kernel_b") == []
    layouts = found["features"]["int8"]["layouts"]
    assert shared(layouts, "query/kernel") == [None, "model"]


def test_the_optimizers_momenta_go_with_their_weights(found):
    momenta = found["features"]["plain"]["optimizer"]
    axes = [x for path, x in momenta.items() if "attention_query_kernel" in path]
    assert len(axes) == 2
    assert all(x[:2] == [None, "model"] for x in axes)


def test_heads_that_cannot_be_shared_evenly_are_refused(found):
    assert re.search(
        r"`num_heads` must be a multiple of the 4 devices .*'model'.*'six'.*=6",
        found["refused"],
    )


# ------------------------------------------------------------------------ the map


def mesh(**names):
    shape, axes = (1, 2), list(names) or ["batch", "model"]
    return keras.distribution.DeviceMesh(shape, axes, ["cpu:0", "cpu:1"])


def test_a_layout_of_ones_own_comes_first():
    yours = keras.distribution.LayoutMap(mesh())
    yours[".*query/kernel"] = ("batch", None, None)
    layouts = layout_map(mesh())
    layouts.update(yours)
    layer = keras_mha.MultiHeadAttention(4, 2, name="attention")
    layer.build((1, 3, 8))
    assert layouts["attention/key/kernel"] is None  # built before, and not under it
    with building(layer):
        assert layouts["attention/query/kernel"].axes == ("batch", None, None)
        assert list(layouts["attention/key/kernel"].axes) == [None, "model"]
    assert list(layouts["attention/key/bias"].axes) == ["model"]
    assert layouts["other/key/bias"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "device_mesh.*DeviceMesh.*None"),
        ((mesh(), "heads"), ValueError, r"model_axis.*\['batch', 'model'\].*'heads'"),
        ((mesh(), "model", "data"), ValueError, "batch_axis.*'batch'.*'data'"),
        ((mesh(), "model", "model"), ValueError, "two axes of the mesh"),
    ],
)
def test_wrong_use(arguments, error, message):
    with pytest.raises(error, match=message):
        keras_mha.distribution.layout_map(*arguments)
