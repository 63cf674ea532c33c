"""The demo: its processes, its table, its model and its picture."""

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mha import MultiHeadAttention, attention_maps, info
from keras_mha.__main__ import main
from keras_mha.demo import digits, picture
from keras_mha.demo import model as model_module
from keras_mha.demo.results import Result

pytestmark = pytest.mark.once

CURRENT = keras.backend.backend()


def rows(output):
    """The lines of the table that start with a backend's name, by that name."""
    words = (line.split() for line in output.splitlines())
    return {row[0]: row[1:] for row in words if row and row[0] in info.BACKENDS}


def test_demo_from_training_to_the_table(monkeypatch, tmp_path, capfd):
    # The others would only be more processes: each suite runs on its own backend.
    monkeypatch.setattr(info, "backend_version", {CURRENT: "1.0"}.get)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--epochs", "1", "--output", "deep/folder"]) == 0
    output = capfd.readouterr().out
    assert "110/110" in output  # Keras's progress bar
    files = {file.name for file in (tmp_path / "deep/folder").iterdir()}
    assert files == {"digits.keras", "attention.png"}
    accuracy, difference, _ = rows(output)[CURRENT][1:]
    _, (images, classes) = digits.load()
    model = keras.saving.load_model("deep/folder/digits.keras")
    logits = model.predict(images, verbose=0)
    assert accuracy == f"{(logits.argmax(-1) == classes).mean():.1%}"
    assert float(difference) < 1e-4


@pytest.fixture
def run_without_processes(monkeypatch, tmp_path):
    """Runs the demo with made-up results in place of its processes."""
    trained = Result(np.zeros((4, 10)), accuracy=0.75, seconds=20.0)
    loaded = Result(np.full((4, 10), 2e-6), accuracy=0.5, seconds=1.5)

    def run(failing=(), missing=()):
        def run_under(backend, module, path, *arguments, show=False):
            if backend in failing and module.endswith("evaluate"):
                raise info.ChildProcessFailed(f"what went wrong on {backend}")
            (trained if module.endswith("train") else loaded).save(path)

        versions = {name: "1.0" for name in info.BACKENDS if name not in missing}
        monkeypatch.setattr(info, "backend_version", versions.get)
        monkeypatch.setattr(info, "run_under", run_under)
        return main(["demo", "--backend", "jax", "--output", str(tmp_path)])

    return run


def test_table_shows_every_backend(run_without_processes, capsys):
    assert run_without_processes() == 0
    output = capsys.readouterr().out
    assert "trained on jax" in output
    assert list(rows(output)) == ["tensorflow", "jax", "torch"]
    for backend in info.BACKENDS:
        assert rows(output)[backend] == ["1.0", "50.0%", "2.0e-06", "1.5"]


def test_table_names_the_extra_of_a_missing_backend(run_without_processes, capsys):
    assert run_without_processes(missing=["tensorflow"]) == 0
    output = capsys.readouterr().out
    assert rows(output)["tensorflow"] == ["not", "installed"]
    assert 'pip install "keras-mha[tensorflow]"' in output
    assert rows(output)["torch"][1] == "50.0%"


def test_backend_that_cannot_load_the_file_fails_the_demo(
    run_without_processes, capsys
):
    assert run_without_processes(failing=["torch"]) == 1
    captured = capsys.readouterr()
    assert "what went wrong on torch" in captured.err
    assert rows(captured.out)["torch"] == ["1.0"]
    assert rows(captured.out)["jax"][1] == "50.0%"


def test_split_is_the_same_every_time_and_has_every_class():
    (images, classes), (test_images, test_classes) = digits.load()
    assert len(images) + len(test_images) == 1797
    assert images.shape[1:] == (8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert set(classes) == set(test_classes) == set(range(10))
    np.testing.assert_array_equal(test_images, digits.load()[1][0])


def test_shifted_digits_move_by_a_pixel_and_keep_their_class():
    image = np.zeros((1, 8, 8))
    image[0, 3, 4] = 1
    images, classes = digits.shifted(image, np.array([7]))
    assert {tuple(np.argwhere(moved)[0]) for moved in images} == {
        (3, 4),
        (2, 4),
        (4, 4),
        (3, 3),
        (3, 5),
    }
    np.testing.assert_array_equal(classes, [7] * 5)


def test_model_reads_patches_of_two_by_two():
    model = model_module.build()
    patches = keras.Model(model.input, model.get_layer("patches").output)
    image = np.arange(64, dtype="float32").reshape(1, 8, 8)
    tokens = patches.predict(image, verbose=0)
    assert tokens.shape == (1, 16, 4)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 8, 9])
    np.testing.assert_array_equal(tokens[0, 1], [2, 3, 10, 11])
    np.testing.assert_array_equal(tokens[0, 4], [16, 17, 24, 25])


def test_model_needs_no_layer_of_its_own():
    layers = model_module.build().layers
    own = [layer for layer in layers if not type(layer).__module__.startswith("keras.")]
    assert [type(layer) for layer in own] == [MultiHeadAttention] * 2


def test_rollout_of_no_mixing_is_even():
    scores = np.eye(4).reshape(1, 1, 4, 4)
    np.testing.assert_allclose(picture.rollout([scores, scores]), [[0.25] * 4])


def test_rollout_goes_back_through_the_blocks_in_order():
    """All look at token 0 in the first block and at token 1 in the second."""
    first, second = np.zeros((2, 1, 2, 3, 3))
    first[..., 0] = 1
    second[..., 1] = 1
    # A third of the answer rests on each token. Half of that stays where it is in the
    # second block and all the other half comes from token 1: 1/6, 2/3, 1/6. In the
    # first block half of each stays, and the other half comes from token 0.
    expected = [[1 / 12 + 1 / 2, 1 / 3, 1 / 12]]
    np.testing.assert_allclose(picture.rollout([first, second]), expected)


def test_rollout_of_the_model_shares_out_each_answer():
    images = np.random.default_rng(0).random((3, 8, 8), "float32")
    scores = list(attention_maps(model_module.build(), images).values())
    assert [block.shape for block in scores] == [(3, 4, 16, 16)] * 2
    np.testing.assert_allclose(picture.rollout(scores).sum(axis=1), 1, rtol=1e-5)


def test_picture_has_each_class_and_then_mistakes():
    classes = np.arange(40) % 10
    answers = classes.copy()
    answers[[4, 21, 35]] = 9, 0, 0
    assert picture.choose(answers, classes) == [*range(10), 21, 35]


def test_picture_is_drawn_without_mistakes_too(tmp_path):
    model = model_module.build()
    images = np.random.default_rng(0).random((20, 8, 8), "float32")
    answers = model.predict(images, verbose=0).argmax(-1)
    picture.draw(model, images, answers, tmp_path / "right.png")
    picture.draw(model, images, (answers + 1) % 10, tmp_path / "wrong.png")
    right, wrong = (Image.open(tmp_path / f"{n}.png").size for n in ("right", "wrong"))
    assert wrong[0] == right[0]
    assert wrong[1] > right[1]
