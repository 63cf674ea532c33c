"""One position held by several layers stays one in copies of them, whoever copies."""

import copy
import json
import pickle
import threading

import keras
import numpy as np
import pytest

import keras_mha
from tests.helpers import to_numpy, to_tensor

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
KINDS = {
    "relative": keras_mha.RelativePositionBias,
    "alibi": keras_mha.ALiBi,
    "rotary": keras_mha.RotaryEmbedding,
}


def attention(position, name=None):
    return keras_mha.MultiHeadAttention(2, 4, position=position, name=name)


def chain(*layers):
    x = keras.Input((5, 8))
    y = x
    for layer in layers:
        y = layer(y)
    return keras.Model(x, y)


def model_of_two(kind="relative"):
    position = KINDS[kind]()
    return with_random_weights(chain(attention(position), attention(position)))


def with_random_weights(model):
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=x.shape) for x in model.get_weights()])
    return model


def attention_layers(model):
    kind = keras_mha.MultiHeadAttention
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def positions(model):
    return [layer.position for layer in attention_layers(model)]


def by_config(model):
    return type(model).from_config(model.get_config())


def by_json(model):
    return keras.models.model_from_json(model.to_json())


BY_CONFIG = {
    "clone_model": keras.models.clone_model,
    "recursively": lambda model: keras.models.clone_model(model, recursive=True),
    "from_config": by_config,
    "json": by_json,
}
by_any_config = pytest.mark.parametrize("route", BY_CONFIG)


def check_copy(model, new):
    """Checks that a copy shares what its model shares, and nothing with the model."""
    assert len(positions(new)) == 2
    assert positions(new)[0] is positions(new)[1]
    assert positions(new)[0] is not positions(model)[0]
    shapes = [tuple(weight.shape) for weight in model.weights]
    assert [tuple(weight.shape) for weight in new.weights] == shapes
    new.set_weights(model.get_weights())
    x = to_tensor(X)
    np.testing.assert_allclose(to_numpy(new(x)), to_numpy(model(x)), atol=1e-6)


# ---------------------------------------------------------------------------- routes


@pytest.mark.parametrize("kind", KINDS)
@by_any_config
def test_copies_by_config(route, kind):
    model = model_of_two(kind)
    new = BY_CONFIG[route](model)
    check_copy(model, new)
    configs = [layer.get_config() for layer in attention_layers(model)]
    assert [layer.get_config() for layer in attention_layers(new)] == configs


@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
def test_files(file, tmp_path):
    model = model_of_two()
    model.save(tmp_path / file)
    check_copy(model, keras.saving.load_model(tmp_path / file))


@pytest.mark.parametrize(
    "route", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_pythons_own_copies(route):
    model = model_of_two()
    check_copy(model, route(model))


@pytest.mark.parametrize("file", ["model.weights.h5", "model.h5"])
def test_files_of_weights_load_into_a_clone(file, tmp_path):
    model = model_of_two()
    clone = keras.models.clone_model(model)
    save = model.save_weights if file == "model.weights.h5" else model.save
    save(tmp_path / file)
    clone.load_weights(tmp_path / file)
    for ours, theirs in zip(clone.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_clone_function_may_change_the_layers():
    def changed(layer):
        config = layer.get_config()
        config["name"] = f"copy_of_{layer.name}"
        return type(layer).from_config(config)

    model = model_of_two()
    check_copy(model, keras.models.clone_model(model, clone_function=changed))


def test_a_config_of_another_process():
    text = model_of_two().to_json()
    mark = json.loads(text)["config"]["layers"][1]["config"]["position"]["shared_as"]
    text = text.replace(mark["id"], "not known here")
    first, second = (positions(keras.models.model_from_json(text)) for _ in range(2))
    assert first[0] is first[1]
    assert second[0] is second[1]
    assert first[0] is not second[0]


# ---------------------------------------------------------------------------- models


@keras.saving.register_keras_serializable(package="test_sharing")
class Subclassed(keras.Model):
    def __init__(self, first, second, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = first, second

    def call(self, x):
        return self.second(self.first(x))

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        parts = {"first": serialize(self.first), "second": serialize(self.second)}
        return {**super().get_config(), **parts}

    @classmethod
    def from_config(cls, config):
        for part in ("first", "second"):
            config[part] = keras.saving.deserialize_keras_object(config[part])
        return cls(**config)


def subclassed(position):
    model = Subclassed(attention(position), attention(position))
    model(to_tensor(X))
    return model


def sequential(position):
    return keras.Sequential(
        [keras.Input((5, 8)), attention(position), attention(position)]
    )


def nested_first(position):
    return chain(chain(attention(position)), attention(position))


def nested_last(position):
    return chain(attention(position), chain(attention(position)))


def nested_both(position):
    return chain(*(keras.Sequential([attention(position)]) for _ in range(2)))


def made_in_another_order(position):
    second = attention(position)
    return chain(attention(position), second)


MODELS = [
    subclassed,
    sequential,
    nested_first,
    nested_last,
    nested_both,
    made_in_another_order,
]


@pytest.mark.parametrize("make", MODELS)
@by_any_config
def test_every_kind_of_model(route, make):
    model = with_random_weights(make(keras_mha.RelativePositionBias()))
    new = BY_CONFIG[route](model)
    new(to_tensor(X))  # a subclassed one has no weights before
    check_copy(model, new)


@pytest.mark.parametrize("make", MODELS)
def test_archives_of_every_kind_of_model(make, tmp_path):
    model = with_random_weights(make(keras_mha.RelativePositionBias()))
    model.save(tmp_path / "model.keras")
    new = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(new.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    check_copy(model, new)


@by_any_config
def test_two_positions_of_three_layers_each(route):
    """In turn, and with the same name."""
    first, second = (keras_mha.RelativePositionBias(name="bias") for _ in range(2))
    model = chain(*(attention(position) for position in [first, second] * 3))
    found = positions(BY_CONFIG[route](model))
    assert len({id(position) for position in found}) == 2
    assert all(found[i] is found[i - 2] for i in range(2, 6))


@by_any_config
def test_a_position_that_is_called_by_itself_too(route, tmp_path):
    position = keras_mha.RelativePositionBias()
    x, ids = keras.Input((5, 8)), keras.Input((5,), dtype="int32")
    plain = keras_mha.MultiHeadAttention(2, 4)
    y = plain(attention(position)(x), attention_bias=position(ids))
    model = keras.Model([x, ids], y)
    new = BY_CONFIG[route](model)
    assert len(new.weights) == len(model.weights)
    alone = new.get_layer(position.name)
    assert alone is positions(new)[0]
    assert alone.get_config() == position.get_config()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights)


# ---------------------------------------------------------------------------- apart


@by_any_config
def test_copies_are_independent(route):
    """Of one another, of copies of copies, and of the original."""
    model = model_of_two()
    copies = [BY_CONFIG[route](model) for _ in range(2)]
    copies.append(BY_CONFIG[route](copies[0]))
    for new in copies:
        check_copy(model, new)
    found = {id(positions(each)[0]) for each in (model, *copies)}
    assert len(found) == 4
    before = model.get_weights()
    for new in copies[1:]:
        new.set_weights([weight + 1 for weight in before])
    for each in (model, copies[0]):
        for weight, value in zip(each.get_weights(), before, strict=True):
            np.testing.assert_array_equal(weight, value)


def test_copies_train_together_and_apart_from_the_original():
    model = model_of_two()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    before = to_numpy(positions(model)[0].table.value)
    clone.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    clone.fit(X, X, epochs=1, verbose=0)
    tables = [to_numpy(position.table.value) for position in positions(clone)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert np.abs(tables[0] - before).max() > 0
    np.testing.assert_array_equal(to_numpy(positions(model)[0].table.value), before)


def test_copies_of_one_layer_share_nothing():
    layer, _ = attention_layers(model_of_two())
    first, second = (type(layer).from_config(layer.get_config()) for _ in range(2))
    assert first.position is not second.position
    assert layer.position not in (first.position, second.position)
    assert first.get_config() == second.get_config() == layer.get_config()


def test_a_copy_of_one_layer_is_apart_from_later_copies_of_all():
    model = model_of_two()
    layer, _ = attention_layers(model)
    alone = type(layer).from_config(layer.get_config())
    clone = keras.models.clone_model(model)
    check_copy(model, clone)
    assert alone.position is not positions(clone)[0]


def test_a_position_whose_config_was_changed_is_another():
    layers = attention_layers(model_of_two())
    configs = [layer.get_config() for layer in layers]
    configs[1]["position"]["config"]["num_buckets"] = 8
    first, second = (keras_mha.MultiHeadAttention.from_config(x) for x in configs)
    assert (first.position.num_buckets, second.position.num_buckets) == (32, 8)


def test_threads_copy_apart_from_one_another():
    configs = [layer.get_config() for layer in attention_layers(model_of_two())]
    copies = {}

    def make(thread, i):
        copies[thread, i] = keras_mha.MultiHeadAttention.from_config(configs[i])

    def work():
        make("other", 1)
        started.set()
        go_on.wait(60)
        make("other", 0)

    started, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    started.wait(60)
    make("this", 0)
    make("this", 1)
    go_on.set()
    thread.join()
    for name in ("this", "other"):
        assert copies[name, 0].position is copies[name, 1].position
    assert copies["this", 0].position is not copies["other", 0].position


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_a_position_of_one_layer_says_nothing_of_sharing(kind):
    layer = attention(KINDS[kind]())
    layer.build((2, 5, 8))
    config = layer.get_config()["position"]
    assert "shared_as" not in config
    assert "shared_as" not in config["config"]
    assert "shared_as" not in layer.position.get_config()
