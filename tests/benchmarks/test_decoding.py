"""The decoding benchmark compares what is equal, and its figures reach the README."""

import importlib.util
import json

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import __main__ as command
from benchmarks import cases, readme, results, worker
from benchmarks.cases import Step
from benchmarks.contestants import decoding
from keras_mha import info

BACKEND = keras.backend.backend()
PROGRAMS = cases.programs(BACKEND)


def outputs(step):
    (contestant,) = decoding.contestants([step]).values()
    output, _ = contestant()
    return ops.convert_to_numpy(output)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("token, slots", [(1, 8), (5, 8), (8, 8)])
def test_both_layers_decode_the_same_numbers(program, token, slots):
    pytest.importorskip("keras_hub")
    ours, theirs = (
        outputs(Step(contestant, token, slots, program))
        for contestant in ("keras_mha", "keras_hub")
    )
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_room_that_a_cache_still_has_does_not_change_the_step():
    step, other = Step("keras_mha", 1, 4), Step("keras_mha", 1, 9)
    np.testing.assert_allclose(outputs(step), outputs(other), atol=1e-6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_contestant_ends_at_its_token(program):
    step = Step("keras_mha", 5, 8, program)
    (contestant,) = decoding.contestants([step]).values()
    _, cache = contestant()
    assert ops.convert_to_numpy(cache["length"]).tolist() == [5]
    _, again = contestant()
    assert ops.convert_to_numpy(again["length"]).tolist() == [5]


def test_every_place_is_timed_for_both_layers():
    for backend in info.BACKENDS:
        names = [step.name for step in cases.steps(backend)]
        assert len(set(names)) == len(names) == 6 * len(cases.programs(backend))


def test_the_worker_reports_times_for_a_token():
    wanted = [Step("keras_mha", 5, 8, program) for program in PROGRAMS]
    found = worker.time_decoding(wanted, prefix=8, seconds=0)
    assert found["prefix"]["median"] > 0
    assert [each["step"] for each in found["steps"]] == [s.config for s in wanted]
    assert all(each["times"]["rounds"] == 5 for each in found["steps"])


def test_a_scan_counts_by_the_token():
    assert Step("keras_mha", 4096, 4096, "scan").count == cases.SCANNED
    assert Step("keras_mha", 4096, 4096).count == 1
    times = worker._per_token(worker.timing.Times(8.0, 4.0, 12.0, 7), 4)
    assert times == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 7}


def test_a_missing_peer_is_named_with_the_line_that_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "keras_hub" else find(name, *rest),
    )
    with pytest.raises(info.MissingExtra, match=r"keras-hub, pip install .*benchmark"):
        decoding.contestants([Step("keras_hub", 5, 8)])
    with pytest.raises(SystemExit, match="keras-hub"):
        command._require_peer()


def test_what_is_asked_for_is_measured():
    assert command._parts([], None) == command.PARTS
    assert command._parts([], "decoding") == ("decoding",)
    assert command._parts(["causal 16"], None) == ("time",)


def measured(backend):
    """Results of a backend where all that is timed took milliseconds that add up."""
    times = {"keras_mha": 0.001, "keras_hub": 0.002}
    kept = json.loads(results.path(backend).read_text())
    kept["decoding"] = {
        "keras_hub": "1.2",
        "prefix": {"median": 0.3},
        "steps": [
            {
                "step": step.config,
                "times": {"median": times[step.contestant] * step.slots / 512},
            }
            for step in cases.steps(backend)
        ],
    }
    return results.Results(backend, kept)


def test_the_table_holds_times_and_ratios():
    text = readme.section([measured("jax"), measured("torch")])
    for line in (
        "| decoding, ms: ours / KerasHub 1.2 | JAX | JAX, `lax.scan` | PyTorch |",
        "| token 512, cache of 512 | 1.00 / 2.00 | 1.00 / 2.00 | 1.00 / 2.00 |",
        "| token 4096, cache of 4096 | 8.00 / 16 | 8.00 / 16 | 8.00 / 16 |",
        "| 4096 tokens again, no cache | 300 | – | 300 |",
        "| token 4096 : token 512, same cache "
        "| 1.00x / 1.00x | 1.00x / 1.00x | 1.00x / 1.00x |",
        "| token 4096 : token 512, a cache each "
        "| 8.0x / 8.0x | 8.0x / 8.0x | 8.0x / 8.0x |",
        "| 4096 tokens again : token 4096 | 37.5x | 37.5x | 37.5x |",
    ):
        assert line in text.splitlines()


def test_there_is_no_table_of_what_was_not_measured():
    kept = json.loads(results.path("jax").read_text())
    kept.pop("decoding", None)
    assert "KerasHub" not in readme.section([results.Results("jax", kept)])


def test_every_step_is_kept():
    for found in results.load():
        for step in cases.steps(found.backend):
            assert found.seconds(step), step
        assert found.prefix_seconds()
