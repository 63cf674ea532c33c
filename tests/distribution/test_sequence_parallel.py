"""Devices share sequences on JAX: one device's numbers, on eight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mha import masks
from keras_mha.distribution import SequenceParallel
from keras_mha.distribution.ring_order import EMPTY, FULL, MIXED, order_of

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(*command):
    """Returns what a process of JAX's printed."""
    jax = pytest.importorskip("jax")
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has no jax.shard_map")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found():
    """What a process of eight devices of JAX's says."""
    worker = "tests.distribution.sequence_parallel_worker"
    return json.loads(run("-m", worker).splitlines()[-1])


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_outputs_and_gradients_are_those_of_one_device(found, method):
    cases = {x: y for x, y in found["numbers"].items() if x.endswith(method)}
    assert len(cases) > 4
    assert {x["plan"] for x in cases.values()} == {method}
    errors = {name: x["error"] for name, x in cases.items()}
    off = {
        name: error
        for name, error in errors.items()
        if not error < (0.01 if name.startswith("half") else 1e-5)
    }
    assert not off


def test_there_are_second_derivatives(found):
    assert found["second order"] < 1e-5


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_sums_of_rows_are_those_of_one_device(found, method):
    assert found["sums"][method] < 1e-5


@pytest.mark.parametrize("mesh", ["2 x 4", "2 x 2 x 2"])
def test_a_model_trains_and_predicts_as_on_one_device(found, mesh):
    found = found["models"][mesh]
    one_device, eight = found["losses"]
    np.testing.assert_allclose(eight, one_device, rtol=1e-5)
    assert one_device[-1] < one_device[0]
    assert found["error"] < 1e-4


@pytest.mark.parametrize("mesh", ["2 x 4", "2 x 2 x 2"])
def test_an_archive_knows_nothing_of_devices(found, mesh):
    found = found["models"][mesh]
    assert found["error once loaded"] < 1e-5
    assert found["error without"] < 1e-5


@pytest.mark.parametrize("call", ["within_a_model", "with_a_cache"])
def test_calls_of_layers_are_those_of_one_device(found, call):
    assert found["layers"][call] < 1e-5


# -------------------------------------------------------- what is sent, and memory


@pytest.mark.parametrize("heads", ["", " and heads"])
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_a_layer_gathers_nothing_of_the_sequences_but_masks(found, method, heads):
    assert found["gathered"][method + heads] == ["pred"]


def test_a_ring_sends_to_neighbours_only(found):
    for name in ("ring, 2", "ring, 8", "ring, 8, window"):
        assert set(found["programs"][name]["traffic"]) == {"collective-permute"}


def test_all_to_all_exchanges_heads_for_time_and_nothing_else(found):
    for name in ("all_to_all, 2", "all_to_all, 8"):
        # Query, key, value and output, and back the gradients of all but one of them,
        # which is there already.
        assert found["programs"][name]["traffic"] == {"all-to-all": 7}


def test_a_program_does_not_grow_with_the_devices(found):
    two, eight = (found["programs"][f"ring, {n}"]["traffic"] for n in (2, 8))
    assert eight["collective-permute"] <= two["collective-permute"] + 6


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_memory_per_device_falls_as_devices_are_added(found, method):
    two, eight = (found["programs"][f"{method}, {n}"]["memory"] for n in (2, 8))
    assert eight < 0.5 * two


# ------------------------------------------------------------------ order of a ring


def work(order):
    """Returns how many pairs of chunks each device computes after each hop."""

    def chunks(device):
        return [order.chunk(device % order.size, slot) for slot in range(order.chunks)]

    hops, devices = range(order.first, order.first + order.steps), range(order.size)
    live = order.kinds != EMPTY
    return np.array(
        [
            [live[np.ix_(chunks(d), chunks(d - hop))].sum() for d in devices]
            for hop in hops
        ]
    )


@pytest.mark.parametrize("size", [2, 4, 7])
def test_all_devices_have_as_much_to_do_under_a_causal_mask(size):
    order = order_of(masks.Causal(), 14 * size, 14 * size, size)
    assert (order.chunks, order.first, order.steps) == (2, 0, size)
    assert (work(order)[1:] == 2).all()
    assert (work(order)[0] == 3).all()
    chunks = [order.chunk(d, slot) for d in range(size) for slot in (0, 1)]
    assert sorted(chunks) == list(range(2 * size))
    assert order.kinds[0].tolist() == [MIXED] + [EMPTY] * (2 * size - 1)
    assert order.kinds[-1].tolist() == [FULL] * (2 * size - 1) + [MIXED]


@pytest.mark.parametrize(
    ("mask", "first", "steps"),
    [
        (masks.Causal() & masks.SlidingWindow(8), 0, 2),
        (masks.Causal() & masks.SlidingWindow(10), 0, 3),
        (masks.SlidingWindow(8), 7, 3),  # from the next device's to the one before
        (masks.Causal(-8) & ~masks.Causal(-24), 1, 3),
        (~masks.SlidingWindow(200), 0, 1),  # nobody sees anything
        (None, 0, 8),
        (masks.Padding(np.ones((1, 64), bool)), 0, 8),
    ],
)
def test_keys_go_only_to_who_sees_any_of_them(mask, first, steps):
    order = order_of(mask, 64, 64, 8)
    assert (order.chunks, order.first, order.steps) == (1, first, steps)


def test_chunks_that_cannot_be_halved_are_not():
    assert order_of(masks.Causal(), 72, 72, 8).chunks == 1
    assert order_of(masks.Causal(), 80, 72, 8).chunks == 1
    assert order_of(masks.Causal(), 80, 80, 8).chunks == 2


# ------------------------------------------------------------------ plans, context


@pytest.mark.parametrize(
    ("call", "auto", "ring"),
    [
        ("heads divide", "all_to_all", "ring"),
        ("key heads do not divide", "ring", "ring"),
        ("dense", "ring", "ring"),
        ("dense by head", "all_to_all", "ring"),
        ("bias", "ring", "ring"),
        ("padding", "all_to_all", "ring"),
        ("sums", "all_to_all", "reference"),
        ("scores", "reference", "reference"),
        ("talking heads", "reference", "reference"),
        ("one token", "reference", "reference"),
        ("reference", "reference", "reference"),
    ],
)
def test_a_call_takes_the_way_that_goes(found, call, auto, ring):
    plans = found["plans"]
    assert [plans[f"{call}, {x}"][0] for x in ("auto", "ring")] == [auto, ring]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("key heads do not divide", "2 key heads do not both divide by the 8 devices"),
        ("dense", "rows only"),
        ("scores", "'seq' do not share the call: only the reference can return"),
        ("one token", "do not share the call: there is one query token"),
    ],
)
def test_the_plan_says_why(found, call, reason):
    assert reason in found["plans"][f"{call}, auto"][1]


def test_a_context_sets_it_and_puts_back_what_was_set(found):
    assert found["context"] == [[8], [8], [8], None]


def test_data_is_shared_where_it_divides(found):
    assert found["layouts of data"] == [
        ["batch", "seq", None],
        ["batch", "seq"],
        ["batch"],
        [None, "seq"],
        ["batch", None],
        ["batch", None, None],
        [],
    ]


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        ("length", ["lengths", "8 devices", "'seq'", "pad", "lengths 60 and 60"]),
        ("key length", ["lengths", "lengths 64 and 60"]),
        ("heads", ["'all_to_all'", "6 query heads", "8 devices", "'ring'"]),
        ("key heads", ["'all_to_all'", "2 key heads", "'ring'"]),
        ("no mesh", ["TypeError", "`device_mesh`", "DeviceMesh", "None"]),
        ("no such axis", ["`axis`", "['seq']", "axis='time'"]),
        ("no such batch axis", ["`batch_axis`", "['seq']", "batch_axis='data'"]),
        ("one axis", ["`axis` and `batch_axis`", "two axes"]),
        ("no layouts", ["TypeError", "`layout_map`", "LayoutMap", "{}"]),
        ("other mesh", ["`layout_map`", "same mesh", "(1,)"]),
        ("heads' axis", ["`layout_map`", "different axes", "'seq'"]),
        ("method", ["`method`", "'ring'", "'tree'"]),
    ],
)
def test_wrong_use_says_what_to_do(found, use, parts):
    for part in parts:
        assert part in found["refused"][use]


def test_lengths_of_placeholders_are_not_looked_at(found):
    assert found["refused"]["placeholders"] == "nothing"


def test_other_backends_are_refused_by_name():
    backend = keras.backend.backend()
    if backend == "jax":
        pytest.skip("speaks of other backends")
    mesh = keras.distribution.DeviceMesh((1,), ["seq"], ["cpu:0"])
    with pytest.raises(ValueError, match=f"KERAS_BACKEND.*'jax'.*'{backend}'"):
        SequenceParallel(mesh)
