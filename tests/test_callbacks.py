"""`AttentionRecorder`: pictures of what a model attends to, as it trains."""

import sys

import keras
import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture
def drawn(monkeypatch):
    """What each picture was drawn of, in order."""
    from keras_mha import plotting

    calls, plot = [], plotting.plot_attention

    def watched(scores, query_tokens, key_tokens, heads, **options):
        calls.append((scores, query_tokens, key_tokens, heads, options))
        return plot(scores, query_tokens, key_tokens, heads, **options)

    monkeypatch.setattr(plotting, "plot_attention", watched)
    return calls


QUERIES, KEYS = ["abcde", ["v", "w", "x", "y", "z"]], ["ABCDE", "VWXYZ"]


def test_each_picture_is_of_its_sample_with_its_tokens(tmp_path, drawn):
    fit(
        model(),
        AttentionRecorder(
            X[:2], tmp_path, layers="first", query_tokens=QUERIES, key_tokens=KEYS
        ),
        epochs=1,
    )
    tokens = [(queries, keys) for _, queries, keys, _, _ in drawn]
    first, second = (list("abcde"), list("ABCDE")), (list("vwxyz"), list("VWXYZ"))
    assert tokens == [first, second] * 2
    options = [options for *_, options in drawn]
    assert [each["sample"] for each in options] == [0, 1] * 2
    assert options[1]["title"] == "first, sample 1, after 0 epochs"


def test_chosen_heads_and_queries_keep_their_names(tmp_path, drawn):
    wishes = {"layers": "first", "heads": [1], "query_rows": [3, -1]}
    fit(model(), AttentionRecorder(X[:1], tmp_path, **wishes), epochs=1)
    scores, queries, _, heads, _ = drawn[0]
    assert scores.shape[2] == 2 and queries == ["3", "-1"] and heads == [1]
    tokens = {"query_tokens": QUERIES[:1]}
    fit(model(), AttentionRecorder(X[:1], tmp_path, **wishes, **tokens), epochs=1)
    assert drawn[-1][1] == ["d", "e"]


def test_queries_beyond_the_tokens_have_their_numbers(tmp_path, drawn):
    wishes = {"layers": "first", "query_rows": [4, 1], "query_tokens": [["a", "b"]]}
    fit(model(), AttentionRecorder(X[:1], tmp_path, **wishes), epochs=1)
    assert drawn[0][1] == ["4", "1"]


def test_tokens_are_for_layers_that_have_as_many(tmp_path, drawn):
    inputs = keras.Input((5, 6))
    x = keras_mha.MultiHeadAttention(1, 4, name="cross")(inputs, inputs[:, :3])
    cross = keras.Model(inputs, x)
    cross.compile("sgd", "mse")
    recorder = AttentionRecorder(
        X[:1], tmp_path, query_tokens=QUERIES[:1], key_tokens=KEYS[:1]
    )
    fit(cross, recorder, epochs=1)
    assert drawn[0][1:3] == (list("abcde"), None)


def test_parts_of_a_sample_have_its_tokens(tmp_path, drawn):
    inputs = keras.Input((2, 5, 6))
    layer = keras_mha.MultiHeadAttention(1, 4, attention_axes=2, name="frames")
    frames = keras.Model(inputs, layer(inputs))
    frames.compile("sgd", "mse")
    x = draw(2, 2, 5, 6)
    recorder = AttentionRecorder(x, tmp_path, query_tokens=QUERIES)
    frames.fit(x, x, verbose=0, callbacks=[recorder])
    queries = [queries for _, queries, *_ in drawn[:4]]
    assert queries == [list("abcde")] * 2 + [list("vwxyz")] * 2
    assert files(tmp_path)[::2] == [
        f"frames/sample_{sample}_part_{part}_epoch_0000.png"
        for sample in (0, 1)
        for part in (0, 1)
    ]


def test_a_second_training_begins_with_a_picture_too(tmp_path, drawn):
    trained = model()
    recorder = AttentionRecorder(X[:1], tmp_path, layers="first")
    for _ in range(2):
        fit(trained, recorder, epochs=1)
    titles = [options["title"][-14:] for *_, options in drawn]
    assert titles == ["after 0 epochs", "after 1 epochs"] * 2


def test_names_that_files_may_not_have(tmp_path):
    inputs = keras.Input((5, 6))
    layer = keras_mha.MultiHeadAttention(1, 4, name="first>1")
    named = keras.Model(inputs, layer(inputs))
    named.compile("sgd", "mse")
    fit(named, AttentionRecorder(X[:1], tmp_path), epochs=1)
    assert {name.split("/")[0] for name in files(tmp_path)} == {"first_1"}


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
            with Image.open(file) as picture:
                assert (image.width, image.height) == picture.size

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

    @pytest.mark.parametrize("samples", [None, [], 3.0])
    def test_samples(self, samples, tmp_path):
        with pytest.raises(TypeError, match="`samples` must be an array"):
            AttentionRecorder(samples, tmp_path)

    @pytest.mark.parametrize("name", ["query_tokens", "key_tokens"])
    def test_tokens(self, name, tmp_path):
        message = f"`{name}` must be given for each of the 8 samples.*for 2"
        with pytest.raises(ValueError, match=message):
            AttentionRecorder(X, tmp_path, **{name: ["abcde", "vwxyz"]})
        with pytest.raises(TypeError, match=f"`{name}` must be a sequence"):
            AttentionRecorder(X, tmp_path, **{name: 3})
