"""`AttentionRecorder`: pictures of what a model attends to, as it trains."""

import sys

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import AttentionRecorder
from tests.helpers import to_numpy

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n"


def draw(*shape):
    return np.random.default_rng(list(shape)).normal(size=shape).astype("float32")


X, Y = draw(8, 5, 6), draw(8, 5, 6)


def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    x = keras_mha.MultiHeadAttention(2, 4, name="first", seed=0, dropout=0.1)(inputs)
    x = keras_mha.MultiHeadAttention(1, 4, name="second")(x)
    new = keras.Model(inputs, x)
    new.compile("sgd", "mse")
    return new


def fit(model, *callbacks, **options):
    options = {"epochs": 2, "shuffle": False} | options
    return model.fit(X, Y, verbose=0, callbacks=callbacks, **options)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_draws_each_layer_and_sample_before_and_after_each_epoch(tmp_path):
    fit(model(), AttentionRecorder(X[:2], tmp_path / "maps"))
    assert files(tmp_path / "maps") == [
        f"{layer}/sample_{sample}_epoch_{epoch:04}.png"
        for layer in ("first", "second")
        for sample in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for path in (tmp_path / "maps").rglob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_pictures_show_the_model_at_that_epoch(tmp_path, monkeypatch):
    seen = []
    record = AttentionRecorder.record

    def watched(self, epoch):
        seen.append(
            (epoch, to_numpy(self.model.get_layer("second").output_dense.kernel))
        )
        record(self, epoch)

    monkeypatch.setattr(AttentionRecorder, "record", watched)
    trained = model()
    fit(trained, AttentionRecorder(X[:1], tmp_path, layers="second"))
    (zero, before), (one, middle), (two, after) = seen
    assert (zero, one, two) == (0, 1, 2)
    assert not np.allclose(before, middle) and not np.allclose(middle, after)
    final = to_numpy(trained.get_layer("second").output_dense.kernel)
    np.testing.assert_array_equal(after, final)


def test_chosen_layers_and_epochs(tmp_path):
    recorder = AttentionRecorder(X[:1], tmp_path, layers="second", heads=0, every=2)
    fit(model(), recorder, epochs=5, initial_epoch=1)
    assert files(tmp_path) == [
        f"second/sample_0_epoch_000{epoch}.png" for epoch in (1, 2, 4)
    ]


def test_training_is_what_it_would_have_been(tmp_path):
    watched, alone = model(), model()
    a = fit(watched, AttentionRecorder(X[:1], tmp_path))
    b = fit(alone)
    assert a.history == b.history
    for x, y in zip(watched.weights, alone.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(x), to_numpy(y))


def test_tokens_and_titles(tmp_path, monkeypatch):
    calls = []
    from keras_mha import plotting

    plot = plotting.plot_attention

    def watched(scores, query_tokens, key_tokens, **options):
        calls.append((query_tokens, key_tokens, options["title"]))
        return plot(scores, query_tokens, key_tokens, **options)

    monkeypatch.setattr(plotting, "plot_attention", watched)
    tokens = ["abcde", ["v", "w", "x", "y", "z"]]
    fit(
        model(),
        AttentionRecorder(
            X[:2], tmp_path, layers="first", query_tokens=tokens, key_tokens=tokens
        ),
        epochs=1,
    )
    assert calls[0] == (list("abcde"), list("abcde"), calls[0][2])
    assert calls[1][0] == list("vwxyz")
    assert calls[0][2] == "first, sample 0, after 0 epochs"


def test_tokens_follow_their_sample_where_a_layer_makes_more_rows(tmp_path):
    inputs = keras.Input((2, 5, 6))
    layer = keras_mha.MultiHeadAttention(1, 4, attention_axes=2, name="frames")
    frames = keras.Model(inputs, layer(inputs))
    frames.compile("sgd", "mse")
    x = draw(2, 2, 5, 6)
    tokens = ["abcde", "vwxyz"]
    recorder = AttentionRecorder(x, tmp_path, query_tokens=tokens, key_tokens=tokens)
    frames.fit(x, x, verbose=0, callbacks=[recorder])
    assert len(files(tmp_path)) == 2 * 2 * 2  # samples, frames, before and after


def test_names_that_files_may_not_have(tmp_path):
    layer = keras_mha.MultiHeadAttention(1, 4, name="first")
    inputs = keras.Input((5, 6))
    twice = keras.Model(inputs, layer(layer(inputs)))
    twice.compile("sgd", "mse")
    fit(twice, AttentionRecorder(X[:1], tmp_path), epochs=1)
    assert {name.split("/")[0] for name in files(tmp_path)} == {"first", "first#2"}


class TestTensorBoard:
    def test_pictures_are_in_the_logs(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        logs = tmp_path / "logs"
        recorder = AttentionRecorder(
            X[:1], tmp_path / "maps", layers="first", log_dir=logs
        )
        fit(model(), recorder)
        events = EventAccumulator(str(logs), size_guidance={"images": 0}).Reload()
        assert events.Tags()["images"] == ["first/sample_0"]
        images = events.Images("first/sample_0")
        assert [image.step for image in images] == [0, 1, 2]
        for image in images:
            file = tmp_path / f"maps/first/sample_0_epoch_{image.step:04}.png"
            assert image.encoded_image_string == file.read_bytes()

    def test_missing_it_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name: sys if name != "tensorboard" else None,
        )
        with pytest.raises(ImportError, match=r"needs tensorboard.*\[tensorboard\]"):
            AttentionRecorder(X, tmp_path, log_dir=tmp_path)


class TestWrongUse:
    def test_numbers(self, tmp_path):
        with pytest.raises(
            ValueError, match="`every` must be an integer of at least 1"
        ):
            AttentionRecorder(X, tmp_path, every=0)

    @pytest.mark.parametrize("name", ["query_tokens", "key_tokens"])
    def test_tokens(self, name, tmp_path):
        message = f"`{name}` must be given for each of the 8 samples.*for 2"
        with pytest.raises(ValueError, match=message):
            AttentionRecorder(X, tmp_path, **{name: ["abcde", "vwxyz"]})
