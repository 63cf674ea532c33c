"""The benchmark goes on where it was stopped, whatever it was measuring."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import cases, results, unfinished

pytestmark = pytest.mark.once

MACHINE = {"processor": "Abacus"}
PARTS = command.OF_CASES


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where results are kept, apart from those of the repository."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(unfinished, "PATH", tmp_path / "unfinished.json")
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """What a worker that measures nothing was asked for; `stop` stops it there."""
    asked: list[str] = []

    def lines(backend, module, part, *arguments, environment=None):
        if part == "device":
            yield {"device": measured.device}
            return
        if part == "time":
            yield {"machine": measured.machine}
        for name in arguments if part == "time" else [" ".join((part, *arguments))]:
            if measured.stop == len(asked):
                raise KeyboardInterrupt
            asked.append(name)
            if part == "time":
                every = cases.cases(backend, measured.device)
                case = next(x for x in every if x.name == name)
                yield {"case": case.config, "times": {"round": len(asked)}}
            elif part == "memory":
                case, contestant = json.loads(arguments[0]), arguments[1]
                yield {"case": case, "contestant": contestant, "added_bytes": 1}
            else:
                yield {"decoding": {"steps": []}}

    monkeypatch.setattr(command, "lines", lines)
    measured = SimpleNamespace(asked=asked, stop=None, machine=MACHINE, device="cpu")
    return measured


@pytest.fixture
def run(measured, monkeypatch):
    """Runs the command for JAX with more arguments; it writes no pages."""
    monkeypatch.setattr(command, "_require_peer", lambda: None)
    monkeypatch.setattr(results, "load", lambda: [])
    monkeypatch.setattr(
        command.grid, "measure", lambda *given: measured.asked.append(given)
    )
    monkeypatch.setattr(command.accelerators, "show", lambda *given: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--backend=jax", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return str(ended.value)

    return run


def everything():
    memory = [
        " ".join(("memory", json.dumps(case.config), who))
        for case, who in command._memory()
    ]
    return [*(case.name for case in cases.cases("jax")), *memory, "decoding"]


ALL, TIMED = len(everything()), len(cases.cases("jax"))


@pytest.mark.parametrize("stop", [3, TIMED + 2, ALL - 1])
def test_what_was_measured_before_the_stop_is_not_measured_again(measured, stop):
    measured.stop = stop
    with pytest.raises(KeyboardInterrupt):
        command.measure("jax", [], PARTS)
    assert measured.asked == everything()[:stop]
    measured.stop = None
    command.measure("jax", [], PARTS)
    assert measured.asked == everything()
    kept = json.loads(results.path("jax").read_text())
    assert len(kept["times"]) == TIMED
    assert len(kept["memory"]) == len(command._memory())
    assert kept["machine"] == MACHINE and "decoding" in kept


def test_a_backend_that_is_done_is_not_measured_again_by_the_same_run(measured):
    for _ in range(2):
        command.measure("jax", [], PARTS)
    assert measured.asked == everything()


def test_a_run_that_was_finished_begins_anew(measured):
    command.measure("jax", [], PARTS)
    unfinished.forget(f"jax {part}" for part in PARTS)
    command.measure("jax", [], PARTS)
    assert measured.asked == 2 * everything()


def test_one_part_begins_anew_and_keeps_the_others(measured):
    command.measure("jax", [], PARTS)
    unfinished.forget(f"jax {part}" for part in PARTS)
    command.measure("jax", [], ("memory",))
    assert measured.asked[len(everything()) :] == [
        name for name in everything() if name.startswith("memory")
    ]
    kept = json.loads(results.path("jax").read_text())
    assert len(kept["memory"]) == len(command._memory())
    assert len(kept["times"]) == TIMED


def test_a_case_that_is_named_is_measured_again(measured):
    command.measure("jax", [], ("time",))
    unfinished.forget(["jax time"])
    before = len(measured.asked)
    command.measure("jax", ["causal 16"], ("time",))
    assert measured.asked[before:] == ["causal 16"]
    kept = json.loads(results.path("jax").read_text())
    assert len(kept["times"]) == before
    assert kept["times"][-1]["times"] == {"round": before + 1}


def test_a_run_does_not_go_on_on_another_machine(measured):
    measured.stop = 3
    with pytest.raises(KeyboardInterrupt):
        command.measure("jax", [], PARTS)
    measured.stop, measured.machine = None, {"processor": "Napier"}
    with pytest.raises(SystemExit, match="--again"):
        command.measure("jax", [], PARTS)


def test_a_stopped_run_on_a_gpu_goes_on_apart_from_that_on_a_cpu(measured, run):
    on_gpu = [case.name for case in cases.cases("jax", "gpu")]
    measured.device = "gpu"
    run()
    assert measured.asked == on_gpu
    measured.asked.clear()
    measured.device = "cpu"
    measured.stop = 3
    with pytest.raises(KeyboardInterrupt):
        command.measure("jax", [], PARTS)
    measured.device, measured.stop = "gpu", 5
    with pytest.raises(KeyboardInterrupt):
        command.measure("jax", [], ("time",), "gpu")
    measured.stop = None
    command.measure("jax", [], ("time",), "gpu")
    assert measured.asked == [*everything()[:3], *on_gpu]
    measured.device = "cpu"
    command.measure("jax", [], PARTS)
    assert measured.asked == [*everything()[:3], *on_gpu, *everything()[3:]]


def test_a_run_on_a_gpu_that_is_finished_begins_anew(measured, run):
    measured.device = "gpu"
    on_gpu = [case.name for case in cases.cases("jax", "gpu")]
    for _ in range(2):
        run()
    assert measured.asked == 2 * on_gpu
    assert unfinished.parts() == []


@pytest.mark.parametrize("part", ["memory", "decoding", "grid", "thresholds"])
def test_what_is_of_cpus_is_refused_on_a_gpu(part, measured, run, folder):
    measured.device = "gpu"
    assert run("--only", part) == f"on a gpu time is measured, not {part}"
    assert measured.asked == [] and not list(folder.iterdir())


def test_a_case_kept_before_cases_had_a_type_is_measured_again(measured):
    old = {"case": {"kind": "causal", "length": 16, "compiler": ""}, "times": {}}
    kept = {"machine": MACHINE, "times": [old], "memory": []}
    results.path("jax").write_text(json.dumps(kept))
    command.measure("jax", ["causal 16"], ("time",))
    (found,) = json.loads(results.path("jax").read_text())["times"]
    assert found["times"] == {"round": 1}


def test_the_grid_is_asked_for_by_name():
    assert command._parts([], "grid") == ("grid",)
    assert command._parts(["1x16"], "grid") == ("grid",)
    assert {"grid", "thresholds"} < set(command._parts([], None))
