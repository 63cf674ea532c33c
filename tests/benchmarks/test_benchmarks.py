"""The benchmarks run, and the README's figures are the ones that were measured."""

import re
from pathlib import Path

import keras
import pytest

from benchmarks import cases, chinese, contestants, draw, readme, results, scale
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
