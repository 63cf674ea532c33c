"""`keras-mha bench`: timing in turns, one measurement, and the table."""

import dataclasses
import json
import sys

import keras
import pytest

from keras_mha import bench, info
from keras_mha.__main__ import main
from keras_mha.bench import machine, timing, worker
from tests.helpers import needs_window_of_keras

pytestmark = pytest.mark.once

CURRENT = keras.backend.backend()


def test_functions_take_turns_and_are_warmed_up_first():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.in_turns(functions, seconds=0, least=3)
    assert calls[:2] == ["a", "b"]
    for start in (2, 4, 6):
        assert sorted(calls[start : start + 2]) == ["a", "b"]
    assert times["a"].rounds == times["b"].rounds == 3
    assert len(calls) == 8


def test_timing_stops_after_the_most_rounds():
    assert timing.in_turns({"a": int}, seconds=60, most=4)["a"].rounds == 4


def test_a_summary_has_the_median_and_the_quartiles():
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert timing.summary([7.0]) == (7.0, 7.0, 7.0, 1)


def test_the_machine_is_described_without_naming_it():
    found = machine.description(CURRENT)
    assert found["cores"] >= 1
    assert found["processor"]
    assert found[CURRENT] == info.backend_version(CURRENT)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"dropout": 0.1, "sliding_window": 4}, marks=needs_window_of_keras
        ),
    ],
)
def test_a_measurement_times_both_layers(options):
    found = worker.measure(8, options, seconds=0)
    assert set(found) == {"predict", "train"}
    for times in found.values():
        assert set(times) == {"keras", "keras_mha"}
        assert all(seconds > 0 for seconds in times.values())


def test_of_an_accelerator_half_types_and_batches_are_measured(monkeypatch):
    called = []

    def spy(name):
        function = getattr(keras.Model, name)

        def wrapper(model, x, *rest, **options):
            called.append((name, x.shape[0], keras.ops.is_tensor(x)))
            called.append(model.layers[-1].compute_dtype)
            return function(model, x, *rest, **options)

        monkeypatch.setattr(keras.Model, name, wrapper)

    for name in ("predict_on_batch", "test_on_batch", "train_on_batch"):
        spy(name)
    worker.measure(8, {}, 0, bench.ON_ACCELERATOR)
    assert {call for call in called if isinstance(call, tuple)} == {
        ("test_on_batch", 8, True),
        ("train_on_batch", 8, True),
    }
    assert {call for call in called if isinstance(call, str)} == {"bfloat16"}


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_the_device_decides_what_is_measured(device, monkeypatch, capsys):
    settings = []
    monkeypatch.setattr(info, "device_kind", lambda: device)
    monkeypatch.setattr(worker, "measure", lambda *given: settings.append(given[-1]))
    monkeypatch.setattr(sys, "argv", ["worker", "0"])
    worker.main()
    expected = bench.ON_CPU if device == "cpu" else bench.ON_ACCELERATOR
    assert settings == [expected] * len(bench.CASES)
    assert json.loads(capsys.readouterr().out)["machine"]["device"] == device


@pytest.fixture
def instant_worker(monkeypatch):
    """Has every measurement end at once, with Keras's layer twice as slow."""
    asked = []

    def run_under(backend, module, seconds, **options):
        asked.append((backend, module))
        times = {"keras": 0.004, "keras_mha": 0.002}
        result = {
            "times": {case: {"predict": times, "train": times} for case in bench.CASES}
        }
        result["machine"] = {"processor": "A processor", "cores": 2, "device": "gpu"}
        result["machine"] |= dataclasses.asdict(bench.ON_ACCELERATOR)
        return f"a greeting\n{json.dumps(result)}\n"

    monkeypatch.setattr(info, "run_under", run_under)
    return asked


def test_bench_measures_every_case_and_shows_a_table(instant_worker, capsys):
    assert main(["bench", "--backend", CURRENT]) == 0
    assert instant_worker == [(CURRENT, "keras_mha.bench.worker")]
    shown = capsys.readouterr().out
    setting = "gpu, batch of 8, mixed_bfloat16"
    for text in (CURRENT, "16 tokens", "4.0 / 2.0", "2.0x", "A processor, 2 cores"):
        assert text in shown
    assert f"{CURRENT}: {setting}" in shown


def test_bench_measures_every_installed_backend_by_default(instant_worker, monkeypatch):
    monkeypatch.setattr(
        info, "backend_version", {"jax": "1", "torch": "2", "tensorflow": None}.get
    )
    assert main(["bench"]) == 0
    assert {backend for backend, *_ in instant_worker} == {"jax", "torch"}


def test_bench_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(info, "backend_version", lambda backend: "1.0")
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--backend", CURRENT]) == 1
    message = capsys.readouterr().err
    assert "the benchmark needs rich" in message
    assert 'pip install "keras-mha[bench]"' in message
