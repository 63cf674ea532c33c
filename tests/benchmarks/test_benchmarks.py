"""The benchmarks run, and the README's figures are the ones that were measured."""

import re
import sys
from pathlib import Path

import keras
import pytest

from benchmarks import __main__ as benchmark
from benchmarks import (
    cases,
    chinese,
    contestants,
    draw,
    readme,
    results,
    scale,
    unfinished,
)
from benchmarks.cases import Case
from tests.helpers import needs_window_of_keras

pytestmark = pytest.mark.once

BACKEND = keras.backend.backend()
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@needs_window_of_keras
@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_contestants_of_every_case_run(kind):
    case = Case(kind, 8)
    names = {"keras_mha", "keras"} if kind == "causal" else {"keras_mha"}
    for name in names:
        ((forward, training),) = contestants.contestants(case, only=name).values()
        forward()
        training()


@needs_window_of_keras
@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_contestants_run_in_half_types_and_batches(kind):
    case = Case(kind, 8, batch=3, dtype="bfloat16")
    found = contestants.contestants(case)
    for name in {"keras_mha", "torch.nn", "flax.nnx", "torch sdpa"} & {*found}:
        forward, training = found[name]
        forward()
        training()


def test_of_a_gpu_what_is_trained_there_is_measured():
    for device in ("gpu", "tpu"):
        found = cases.cases(BACKEND, device)
        assert {case.dtype for case in found} == {"bfloat16"}
        assert all(case.batch * case.length == cases.TOKENS for case in found)
        assert {case.kind for case in found} == {*cases.KINDS}
    assert {case.dtype for case in cases.cases(BACKEND)} == {"float32"}
    assert {case.batch for case in cases.cases(BACKEND)} == {1}


def test_what_a_gpu_took_is_kept_apart_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(unfinished, "PATH", tmp_path / "unfinished.json")
    case = Case("causal", 2048, batch=8, dtype="bfloat16")
    alone = Case("biased", 2048, batch=8, dtype="bfloat16")
    times = {"keras": {"median": 0.003}, "keras_mha": {"median": 0.002}}
    ours = {"keras_mha": times["keras_mha"]}
    lines = {
        "device": [{"device": "gpu"}],
        "time": [
            {"machine": {"devices": ["gpu:0"]}},
            {"case": case.config, "times": {"forward": times, "training": times}},
            {"case": alone.config, "times": {"forward": ours, "training": ours}},
        ],
    }
    monkeypatch.setattr(benchmark, "lines", lambda _, module, what, *names: lines[what])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--backend", BACKEND])
    for module in (benchmark.draw, benchmark.readme):
        for name in ("all_pictures", "write"):
            monkeypatch.setattr(module, name, None, raising=False)
    monkeypatch.setattr(benchmark, "_require_peer", lambda: None)
    with pytest.raises(SystemExit):  # of a CPU nothing was measured
        benchmark.main()
    assert [file.name for file in tmp_path.iterdir()] == [f"{BACKEND}-gpu.json"]
    shown = capsys.readouterr().out
    assert f"{BACKEND} on gpu:0" in shown
    assert "causal 2048, batch of 8, bfloat16" in shown
    assert "1.50x" in shown
    assert "2.00 ms (no keras)" in shown


def test_keras_is_not_asked_for_what_it_cannot_do():
    names = set(contestants.contestants(Case("biased", 8), only="keras"))
    assert names == set()


def test_every_backend_has_its_peers():
    from importlib import import_module

    makers = import_module(f"benchmarks.contestants.{BACKEND}").makers
    peers = {"jax": "flax.nnx", "torch": "torch.nn", "tensorflow": "keras"}
    assert peers[BACKEND] in makers(Case("causal", 1024))
    assert "keras" not in makers(Case("causal", 32768))


def test_the_readme_holds_what_was_measured():
    kept = results.load()
    assert {found.backend for found in kept} == {"tensorflow", "jax", "torch"}
    assert readme.section(kept) in README.read_text()


def test_the_chinese_readme_holds_the_same_in_chinese():
    text = chinese.translated(readme.section(results.load()))
    assert text in (ROOT / "README.zh-CN.md").read_text("utf-8")
    names = r"`.*?`|\(.*?\)|\b(GiB|MiB|TensorFlow|JAX|PyTorch|Keras|KerasHub|XLA)\b"
    words = re.findall(r"[a-z]{4,}", re.sub(names, "", text.rsplit("\n", 1)[0]))
    assert set(words) == {"dropout", "sliding", "window"}  # all else is translated


def test_every_case_is_kept():
    for found in results.load():
        for case in cases.cases(found.backend):
            assert found.times(case, "forward"), case
            assert found.times(case, "training"), case
        for case in cases.memory_cases():
            assert found.added_bytes(case, "keras_mha"), case


def test_the_readme_is_written_between_its_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.write(results.load(), file)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "| causal, 4096 tokens |" in text


def test_a_readme_without_marks_is_left_alone(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="no marks"):
        readme.write(results.load(), file)
    assert file.read_text() == "no marks"


def test_the_pictures_are_drawn(tmp_path):
    draw.all_pictures(results.load(), scale.load(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "memory.png",
        "ratios.png",
        "scale.png",
        "time.png",
    }
