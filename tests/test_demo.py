"""The demo: its processes, its table, its model and its picture."""

import keras

from keras_mha import demo
from keras_mha.__main__ import main
from keras_mha.demo import digits

CURRENT = keras.backend.backend()


def only_current_installed(monkeypatch):
    monkeypatch.setattr(demo, "backend_version", {CURRENT: "1.0"}.get)


def rows(output):
    """The lines of the table that start with a backend's name, by that name."""
    words = (line.split() for line in output.splitlines())
    return {row[0]: row[1:] for row in words if row and row[0] in demo.BACKENDS}


def test_demo_from_training_to_the_table(monkeypatch, tmp_path, capfd):
    only_current_installed(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--epochs", "1", "--output", "deep/folder"]) == 0
    output = capfd.readouterr().out
    assert "Epoch 1/1" in output  # Keras's progress bar
    files = {file.name for file in (tmp_path / "deep/folder").iterdir()}
    assert files == {"digits.keras", "attention.png"}
    accuracy, difference, _ = rows(output)[CURRENT][1:]
    _, (images, classes) = digits.load()
    model = keras.saving.load_model("deep/folder/digits.keras")
    logits = model.predict(images, verbose=0)
    assert accuracy == f"{(logits.argmax(-1) == classes).mean():.1%}"
    assert float(difference) < 1e-4
