"""The grid measures what it says, loses nothing when it is stopped, and is told."""

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_mha
from benchmarks import chinese, results, unfinished
from benchmarks.grid import found as found_by_the_grid
from benchmarks.grid import (
    kept,
    layers,
    pages,
    picture,
    rounds,
    run,
    thresholds,
    worker,
)
from benchmarks.grid.cells import (
    CROSS,
    KINDS,
    PASSES,
    SHAPES,
    WIDTHS,
    Cell,
    cells,
)
from keras_mha import info
from tests.helpers import to_numpy

once = pytest.mark.once
BACKEND = keras.backend.backend()
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"tensorflow": ("eager", "compiled", "xla"), "jax": ("eager", "compiled")}
MACHINE = {
    "processor": "Abacus",
    "cores": 2,
    "memory_gib": 1.0,
    "keras": "3",
    **dict.fromkeys(info.BACKENDS, "1"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where results are kept, apart from those of the repository."""
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(unfinished, "PATH", tmp_path / "unfinished.json")
    return tmp_path


# -------------------------------------------------------------- what is measured


def small(kind, program="eager"):
    batch, length = (8, 128) if kind == CROSS else (2, 8)
    return Cell(kind, batch, length, 4, 8, program)


@once
@pytest.mark.parametrize("backend", info.BACKENDS)
def test_the_usual_program_of_a_backend_is_measured_everywhere(backend):
    usual = "eager" if backend == "torch" else "compiled"
    found = {
        (x.kind, x.batch, x.length, x.heads, x.width)
        for x in cells(backend)
        if x.program == usual
    }
    calls = {(kind, *shape) for kind in KINDS for shape in SHAPES} | {("cross", 8, 128)}
    assert found == {call + width for call in calls for width in WIDTHS}
    names = [cell.name for cell in cells(backend)]
    assert len(set(names)) == len(names)


@once
@pytest.mark.parametrize("backend", info.BACKENDS)
def test_what_is_left_out_is_as_the_page_says(backend):
    def shapes(program, width):
        return {
            (x.batch, x.length)
            for x in cells(backend)
            if x.program == program and (x.heads, x.width) == width
        } - {(8, 128)}

    long = {(16, 512), (4, 1024), (1, 2048), (1, 4096)}
    from_8x512_on = {(8, 512), (1, 1024), *long}
    everything = set(SHAPES)
    if backend != "torch":
        assert shapes("eager", (8, 64)) == everything
        assert shapes("eager", (4, 32)) == everything - from_8x512_on
    else:
        assert shapes("compiled", (8, 64)) == {(1, 128), (8, 512), (1, 1024)}
    if backend == "tensorflow":
        assert shapes("xla", (8, 64)) == everything - long
    assert (shapes("xla", (8, 64)) != set()) == (backend == "tensorflow")
    assert shapes("xla", (4, 32)) == set()


@pytest.mark.parametrize("kind", [*KINDS, CROSS])
def test_both_layers_compute_the_same(kind):
    cell = small(kind)
    outputs, weights = [], None
    for name in (results.OURS, results.KERAS):
        layer = layers.built_layer(cell, name)
        weights = weights or layer.get_weights()
        layer.set_weights(weights)
        outputs.append(output(cell, layer))
    if kind == "padding":  # in rows that are padding Keras attends to all evenly
        outputs = [x[layers.valid(cell)] for x in outputs]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def output(cell, layer):
    """What a cell's call of a layer gives, of tensors that no call had before."""
    inputs = [keras.ops.convert_to_tensor(x) for x in layers.arrays(cell)]
    return to_numpy(layers.called(cell, layer)(*inputs, training=False))


@pytest.mark.parametrize("kind", ["causal", "padding"])
@pytest.mark.parametrize("name", [results.OURS, results.KERAS])
def test_the_mask_reaches_the_layer(kind, name):
    layer = layers.built_layer(small(kind), name)
    masked, plain = output(small(kind), layer), output(small("plain"), layer)
    assert np.abs(masked - plain).max() > 1e-3


@pytest.mark.parametrize(
    "kind, program",
    [(kind, PROGRAMS.get(BACKEND, ("eager",))[-1]) for kind in (*KINDS, CROSS)]
    + [("causal", program) for program in PROGRAMS.get(BACKEND, ("eager",))[:-1]],
)
def test_a_cell_is_measured(kind, program, monkeypatch):
    monkeypatch.setattr(rounds, "ENOUGH", ((0.0, 1),))
    found = worker.measure_cell(small(kind, program))
    assert found["cell"] == small(kind, program).config
    for times in found["times"].values():
        ratio = times["keras"]["median"] / times["keras_mha"]["median"]
        assert times["ratio"]["median"] == pytest.approx(ratio, rel=1e-2)


@once
def test_what_is_slower_is_timed_again_with_three_of_each_layer(monkeypatch):
    made, calls, given = [], [], []

    def contestants(cell):
        made.append(copy := len(made))
        return {who: _pair(who, copy) for who in ("keras_mha", "keras")}

    def _pair(who, copy):
        return tuple(lambda run=run: calls.append((who, copy, run)) for run in PASSES)

    def compare(functions, warm_ups):
        """At first ours takes twice as long in training, and then as long."""
        calls.clear()
        for each in functions.values():
            for function in each:
                function()
        given.append(list(calls))
        times = {"median": 1.0, "first": 10.0 * len(given)}
        ratio = {"median": 0.5 if len(given) == 2 else 1.0}
        return {"keras_mha": dict(times), "keras": dict(times), "ratio": ratio}

    monkeypatch.setattr(worker.layers, "contestants", contestants)
    monkeypatch.setattr(worker, "compare", compare)
    found = worker.measure_cell(small("plain", "eager"))["times"]
    assert given == [
        [(who, copy, run) for who in ("keras_mha", "keras") for copy in copies]
        for run, copies in (("forward", [0]), ("training", [0]), ("training", range(3)))
    ]
    assert found["training"]["ratio"]["median"] == 1.0
    assert found["training"]["keras"]["first"] == 20.0  # not of a cell compiled before
    assert found["forward"]["keras"]["first"] == 10.0


@pytest.mark.parametrize("kind", thresholds.kinds(BACKEND))
def test_tiles_and_whole_scores_are_compared_where_no_kernel_is_fused(
    kind, monkeypatch
):
    monkeypatch.setattr(rounds, "ENOUGH", ((0.0, 1),))
    point = thresholds.Point(kind, 1, 8)
    x = keras.ops.zeros((1, 8, 8, 64))
    plan = keras_mha.plan_attention(x, x, x, **thresholds.options(point), device="cpu")
    assert plan.implementation != "fused"
    found = worker.thresholds.measure_point(point)
    assert set(found["times"]["training"]) == {"blockwise", "reference", "ratio"}


# -------------------------------------------------------------------------- rounds


def timed(ours, theirs, compiling=0.0):
    """Compares two functions that take so many seconds, by a clock of their own."""
    now = [0.0]

    def function(seconds):
        calls = itertools.count()

        def call():
            now[0] += seconds + (compiling if next(calls) == 0 else 0)

        return call

    functions = {"keras_mha": [function(ours)], "keras": [function(theirs)]}
    return rounds.compare(functions, clock=lambda: now[0])


@once
def test_the_ratio_and_the_first_call_are_told():
    found = timed(0.1, 0.2, compiling=3.0)
    assert found["ratio"]["median"] == found["ratio"]["low"] == pytest.approx(2)
    assert found["keras_mha"]["median"] == pytest.approx(0.1)
    assert found["keras_mha"]["first"] == pytest.approx(3.1)


@once
@pytest.mark.parametrize(
    "seconds, count", [(1e-5, rounds.MOST), (0.01, 25), (0.1, 10), (0.5, 5), (20, 3)]
)
def test_slow_calls_take_few_rounds_and_fast_ones_many(seconds, count):
    found = timed(seconds, seconds)["ratio"]["rounds"]
    assert found == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("copies, count", [(1, 78), (3, 700)])
def test_rounds_go_on_until_the_median_is_known(copies, count):
    now, calls = [0.0], []

    def function(name, seconds):
        scattered = itertools.cycle(seconds)

        def call():
            calls.append(name)
            now[0] += next(scattered)

        return call

    functions = {
        "keras_mha": [function("keras_mha", [0.004]) for _ in range(copies)],
        "keras": [function("keras", [0.004, 0.0044]) for _ in range(copies)],
    }
    found = rounds.compare(functions, warm_ups=2, clock=lambda: now[0])["ratio"]
    # The least, 0.5 s, are over before that.
    assert found["rounds"] == pytest.approx(count, rel=0.1)
    assert found["copies"] == copies
    assert calls.count("keras") == copies * (2 + found["rounds"])


@pytest.mark.parametrize("copies", [1, 3])
def test_rounds_end_where_the_median_stays_unknown(copies):
    now, scattered = [0.0], random.Random(0)

    def call():
        now[0] += scattered.choice([0.02, 0.4])

    functions = {"keras_mha": [call] * copies, "keras": [call] * copies}
    found = rounds.compare(functions, clock=lambda: now[0])
    patience = copies * rounds.PATIENCE
    assert patience <= now[0] < 2 * patience
    assert found["ratio"]["rounds"] > 10


def test_of_several_functions_a_round_takes_the_median():
    now = [0.0]

    def function(seconds):
        def call():
            now[0] += seconds

        return call

    functions = {
        "keras_mha": [function(x) for x in (0.1, 0.2, 0.9)],
        "keras": [function(x) for x in (0.1, 0.3, 0.4)],
    }
    found = rounds.compare(functions, clock=lambda: now[0])
    assert found["ratio"]["median"] == pytest.approx(1.5)
    assert found["keras_mha"]["median"] == pytest.approx(0.2)
    assert found["keras_mha"]["first"] == pytest.approx(0.1)


# ----------------------------------------------------------------- what is kept


def made_up(cell, ratio=2.0, first=1.0):
    """The result of a cell in which Keras's layer takes `ratio` times as long."""
    spread = {"low": ratio - 0.1, "median": ratio, "high": ratio + 0.1}
    quartiles = {"low": 0.4, "high": 0.6}
    times = {
        "keras_mha": {"median": 0.5, "first": 0.5 + first, **quartiles},
        "keras": {"median": 0.5 * ratio, "first": 0.5 * ratio + 2.0, **quartiles},
        "ratio": spread,
    }
    times = {"forward": times, "training": times}
    return {"name": cell.name, "cell": cell.config, "times": times}


class Worker:
    """Measures nothing, says that all takes half as long as Keras's.

    Args:
        stop_after: Integer, how many are measured before it is stopped.
        processor: String.
    """

    def __init__(self, stop_after=None, processor="Abacus"):
        self.measured, self.stop_after = [], stop_after
        self.machine = MACHINE | {"processor": processor}

    def __call__(self, part, backend, wanted):
        yield {"machine": self.machine}
        for each in wanted:
            yield {"started": each.name}
            if len(self.measured) == self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(each.name)
            yield made_up(each)


def measure(worker, names=()):
    run.measure("grid", "torch", list(names), worker)
    return worker.measured


def stopped_after(count):
    first = Worker(stop_after=count)
    with pytest.raises(KeyboardInterrupt):
        measure(first)
    return first.measured


@once
def test_a_run_that_was_stopped_goes_on_where_it_was(folder):
    before = stopped_after(60)
    after = measure(Worker())
    assert before + after == [cell.name for cell in cells("torch")]
    assert set(kept.kept("grid", "torch").found) == {*before, *after}


@once
def test_a_run_that_was_finished_begins_anew(folder):
    stopped_after(60)
    unfinished.forget(["torch grid"])
    assert len(measure(Worker())) == len(cells("torch"))


@once
def test_half_a_line_is_measured_again(folder):
    before = stopped_after(60)
    path = folder / "grid" / "torch.jsonl"
    path.write_text(path.read_text()[:-40])
    after = measure(Worker())
    assert after[0] == before[-1]
    assert len(after) == len(cells("torch")) - 59
    assert len(kept.kept("grid", "torch").found) == len(cells("torch"))


@once
def test_what_is_named_is_measured_again_and_the_rest_kept(folder):
    measure(Worker())
    again = measure(Worker(), ["causal 1x16 ", "cross"])
    assert again == [
        cell.name
        for cell in cells("torch")
        if cell.kind == "cross" or (cell.kind == "causal" and cell.shape == "1x16")
    ]
    assert len(kept.kept("grid", "torch").found) == len(cells("torch"))


@once
def test_figures_of_two_machines_are_not_mixed(folder):
    stopped_after(60)
    with pytest.raises(SystemExit, match=r"begun on .*Abacus.* this is .*Napier"):
        measure(Worker(processor="Napier"))


@once
def test_the_latest_result_counts(tmp_path):
    found = kept.Kept(tmp_path / "x.jsonl")
    for ratio in (1.0, 3.0):
        found.add(made_up(small("plain"), ratio))
    (record,) = kept.Kept(found.path).found.values()
    assert record["times"]["forward"]["ratio"]["median"] == 3.0


@once
def test_the_time_left_follows_the_time_that_it_took():
    now = [0.0]
    wanted = [SimpleNamespace(name=name, cost=1 + 2 * (name == "c")) for name in "abc"]
    left = run.TimeLeft(wanted, clock=lambda: now[0])
    assert left.seconds() is None
    now[0] = 600.0
    left.count("c")
    assert left.seconds() == pytest.approx(400)
    assert left.text() == "about 7 min left"


# ---------------------------------------------------------------- what is told


@pytest.fixture
def found(tmp_path):
    """Results of every cell: of all 2.0, but for two that are lower."""
    low = {"causal 1x16 4x32 compiled": 0.5, "plain 8x512 8x64 compiled": 0.9}
    made = {}
    for backend in info.BACKENDS:
        made[backend] = kept.Kept(tmp_path / f"{backend}.jsonl")
        made[backend].machine = MACHINE
        for cell in cells(backend):
            ratio = low.get(cell.name, 2.0) if backend == "jax" else 2.0
            made[backend].found[cell.name] = made_up(cell, ratio)
    return made


@once
def test_the_tables_tell_the_lowest(found):
    lines = pages.section(found).splitlines()
    for line in (
        "| the grid | TensorFlow | JAX | PyTorch |",
        "| calls, forward and training | 554 | 492 | 312 |",
        "| under 0.97 | 0 | 4 | 0 |",
        "| under 0.97 by the third quartile too | 0 | 2 | 0 |",
        "| lowest | 2.00x | 0.50x | 2.00x |",
        "| JAX | causal 1 x 16, 4 x 32, compiled | training | 0.50x (0.40–0.60) "
        "| 500 | 250 |",
    ):
        assert line in lines
    assert lines[-1].startswith("Abacus, 2 cores, 1.0 GiB; Keras 3, TensorFlow 1, ")


@once
@pytest.mark.parametrize(
    "ratio, text", [(0.9699, "0.96"), (0.97, "0.97"), (1.0, "1.00"), (2.349, "2.34")]
)
def test_a_ratio_is_not_written_as_more_than_it_is(ratio, text):
    assert found_by_the_grid.cut(ratio) == text


@once
def test_a_grid_that_is_not_finished_says_so(found):
    assert "Measured so far" not in pages.section(found)
    for name in list(found["jax"].found)[:3]:
        del found["jax"].found[name]
    del found["torch"]
    assert "\nMeasured so far: 520 / 523 calls.\n" in pages.section(found)
    assert "520 / 523 个调用。" in chinese.translated(pages.section(found))


@once
def test_the_tables_are_told_in_chinese(found):
    text = chinese.translated(pages.section(found))
    text = re.sub(r"`.*?`|\(docs.*?\)|TensorFlow|JAX|PyTorch|Keras|Abacus", "", text)
    assert set(re.findall(r"[a-z]{4,}", text)) <= {"dropout", "float"}


@once
def test_compiling_is_told_where_something_is_compiled(found):
    text = pages.page(found, {})
    assert (
        "| JAX, `jax.jit`, forward | 1.00 | 2.00 | 0.50 | 0.50 | "
        "plain 1 x 16, 4 x 32, compiled |"
    ) in text.splitlines()
    assert "XLA, training |" in text and "PyTorch" not in text
    assert "Compiling:" not in pages.page({"torch": found["torch"]}, {})
    of = found_by_the_grid.compile_seconds(
        found["jax"], "compiled", "forward", longest=1024
    )
    assert max(cell.length for cell, *_ in of) == 1024


@once
@pytest.mark.parametrize("first, is_told", [(0.15, False), (0.25, True)])
def test_compiling_that_noise_hides_is_not_told(first, is_told, tmp_path):
    made = kept.Kept(tmp_path / "jax.jsonl")
    cell = Cell("plain", 1, 16, 4, 32, "compiled")
    made.found[cell.name] = made_up(cell, first=first)  # quartiles 0.2 s apart
    of = found_by_the_grid.compile_seconds(made, "compiled", "forward", longest=1024)
    assert bool(list(of)) is is_told


@once
def test_the_picture_shows_the_lowest_of_all_widths_and_frames_it(found):
    grid = picture.lowest(found["jax"], "compiled")
    assert grid[0, 2] == grid[0, 3] == 0.5  # causal, forward and training
    assert grid[SHAPES.index((8, 512)), 0] == 0.9
    assert np.isnan(grid[-1, 2:]).all() and (grid[-1, :2] == 2.0).all()  # cross
    assert np.isnan(grid).sum() == 8
    framed = {
        axis.get_title(): len(axis.patches) for axis in picture.heat_map(found).axes
    }
    assert framed["JAX, jax.jit"] == 4
    assert sum(framed.values()) == 4


@once
def test_pages_are_written_between_their_marks(found, tmp_path, monkeypatch):
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    files = ["README.md", "README.zh-CN.md", "docs/speed.md"]
    text = "before\n{}\nold\n{}\nafter\n".format(*pages.MARKS)
    for file in files:
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(kept, "load", lambda part: {})
    pages.write(tmp_path)
    assert [(tmp_path / file).read_text() for file in files] == [text] * 3
    monkeypatch.setattr(kept, "load", lambda part: found if part == "grid" else {})
    pages.write(tmp_path)
    for file, block in zip(
        files,
        (
            pages.section(found),
            chinese.translated(pages.section(found)),
            pages.page(found, {}),
        ),
        strict=True,
    ):
        text = f"before\n{pages.MARKS[0]}\n{block}\n{pages.MARKS[1]}\nafter\n"
        assert (tmp_path / file).read_text("utf-8") == text
    assert (tmp_path / "docs" / "benchmarks" / "grid.png").exists()


@once
def test_the_pages_hold_what_was_measured():
    measured, compared = kept.load("grid"), kept.load(thresholds.PART)
    section = pages.section(measured) if measured else ""
    page = pages.page(measured, compared)
    for file, block in (
        ("README.md", section),
        ("README.zh-CN.md", chinese.translated(section)),
        ("docs/speed.md", page),
    ):
        text = (ROOT / file).read_text("utf-8")
        begin, end = pages.MARKS
        assert text.split(begin)[1].split(end)[0].strip() == block, file


@once
def test_a_threshold_is_where_tiles_stay_the_faster():
    def of(*ratios):
        return [
            {
                "point": thresholds.Point("plain", 1, 128 * 2**i).config,
                "times": {"forward": {"ratio": {"median": ratio}}},
            }
            for i, ratio in enumerate(ratios)
        ]

    assert thresholds.threshold(of(0.5, 1.5, 0.9, 1.1, 1.2), "forward") == 1024**2
    assert thresholds.threshold(of(1.1, 1.2), "forward") == 128**2
    assert thresholds.threshold(of(1.1, 0.9), "forward") is None
    assert thresholds.threshold([], "forward") is None


@once
def test_thresholds_are_told_by_backend_and_kind(tmp_path):
    found = kept.Kept(tmp_path / "torch.jsonl")
    for point in thresholds.points("torch"):
        ratio = 2.0 if point.kind == "dropout" and point.length >= 512 else 0.5
        times = {"ratio": {"median": ratio}}
        found.found[point.name] = {
            "name": point.name,
            "point": point.config,
            "times": {"forward": times, "training": times},
        }
    lines = thresholds.section({"torch": found}).splitlines()
    assert "| PyTorch, dropout | 512² | 512² | 512² | 512² |" in lines
    assert "| PyTorch, soft cap | – | – | – | – |" in lines
