"""`attention_maps`: what the layers of a model attend to, and nothing else touched."""

import threading

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import attention_maps, masks
from tests import oracle
from tests.helpers import only_jax, only_tensorflow, only_torch, to_numpy, to_tensor

MultiHeadAttention = keras_mha.MultiHeadAttention


def draw(*shape):
    return np.random.default_rng(list(shape)).normal(size=shape).astype("float32")


X = draw(2, 6, 8)


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = MultiHeadAttention(2, 4, name="attention")

    def call(self, x):
        return x + self.attention(x, use_causal_mask=True)

    def compute_output_shape(self, input_shape):
        return input_shape


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="model")
        self.blocks = [Block(name="first"), Block(name="second")]
        self.parts = {"last": MultiHeadAttention(4, 2, name="last")}

    def call(self, x):
        memory = x[:, :3]
        for block in self.blocks:
            x = block(x)
        return self.parts["last"](x, memory)


def functional():
    inputs = keras.Input((6, 8))
    first = MultiHeadAttention(2, 4, name="first")
    block = keras.Sequential([keras.Input((6, 8)), Block(name="block")], name="nested")
    x = first(inputs, use_causal_mask=True)
    x = block(x)
    x = MultiHeadAttention(4, 2, name="cross")(x, inputs[:, :3])
    return keras.Model(inputs, first(x), name="model")


def built(model):
    model(X)
    return model


class TestWhichLayers:
    def test_functional_with_a_nested_model_and_a_shared_layer(self):
        model = functional()
        maps = attention_maps(model, X)
        assert list(maps) == [
            "first",
            model.layers[2].layers[0].attention.path,
            "cross",
            "first#2",
        ]
        shapes = [scores.shape for scores in maps.values()]
        assert shapes == [(2, 2, 6, 6), (2, 2, 6, 6), (2, 4, 6, 3), (2, 2, 6, 6)]

    def test_subclassed_with_layers_in_lists_and_dictionaries(self):
        maps = attention_maps(built(Subclassed()), X)
        assert list(maps) == [
            "model/first/attention",
            "model/second/attention",
            "model/last",
        ]

    def test_sequential(self):
        model = keras.Sequential([keras.Input((6, 8)), Block(), Block()])
        assert len(attention_maps(model, X)) == 2

    def test_a_layer_by_itself_with_arguments_of_its_call(self):
        layer = MultiHeadAttention(2, 4, name="attention")
        layer.build((2, 6, 8), (2, 3, 8))
        maps = attention_maps(layer, X, value=X[:, :3])
        assert maps["attention"].shape == (2, 2, 6, 3)

    def test_paths_are_those_of_the_layers(self):
        model = built(Subclassed())
        assert model.blocks[1].attention.path in attention_maps(model, X)

    @pytest.mark.parametrize(
        ("wish", "found"),
        [
            ("model/second/attention", ["model/second/attention"]),
            ("last", ["model/last"]),
            ("model/*/attention", ["model/first/attention", "model/second/attention"]),
            ("model/last", ["model/last"]),
            (["last", "model/first/*"], ["model/first/attention", "model/last"]),
            (lambda model: model.parts["last"], ["model/last"]),
            (lambda model: [model.parts["last"]], ["model/last"]),
        ],
    )
    def test_chosen_layers(self, wish, found):
        model = built(Subclassed())
        maps = attention_maps(model, X, wish(model) if callable(wish) else wish)
        assert list(maps) == found

    def test_a_second_call_can_be_chosen(self):
        model = functional()
        assert list(attention_maps(model, X, "first#2")) == ["first#2"]

    def test_a_model_around_one_that_is_built(self):
        class Scale(keras.layers.Layer):
            def call(self, x):
                return 2 * x

        class Around(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner, self.scale = functional(), Scale()

            def call(self, x):
                return self.scale(self.inner(x))

        model = Around()  # building it, Keras calls it with placeholders
        maps = attention_maps(model, X)
        again = attention_maps(model, X)
        assert list(maps) == list(again) and len(maps) == 4
        for path, scores in maps.items():
            np.testing.assert_array_equal(scores, again[path])


class TestNumbers:
    @pytest.mark.parametrize("make", [functional, Subclassed])
    def test_they_are_what_the_layers_return(self, make):
        model = built(make())
        layer = model.layers[1] if make is functional else model.blocks[0].attention
        _, scores = layer(X, use_causal_mask=True, return_attention_scores=True)
        found = next(iter(attention_maps(model, X).values()))
        np.testing.assert_allclose(found, to_numpy(scores), atol=1e-6)
        assert found.dtype == np.float32

    def test_every_option_counts(self):
        options = {
            "num_key_value_heads": 2,
            "position": keras_mha.ALiBi(),
            "qk_norm": "rms",
            "attention_sink": "learned",
            "logit_soft_cap": 3.0,
            "sliding_window": 4,
            "num_memory_key_values": 2,
            "flash_attention": True,  # such a layer would not return its scores
        }
        layer = MultiHeadAttention(4, 6, **options, name="attention")
        layer.build((2, 6, 8))
        layer.sink.assign([0.0, 1.0, 2.0, 3.0])
        call = {"segment_ids": np.array([[0, 0, 0, 1, 1, 1]] * 2)}
        call["attention_bias"] = draw(4, 6, 6)
        found = attention_maps(layer, X, use_causal_mask=True, **call)["attention"]

        plain = MultiHeadAttention.from_config(
            layer.get_config() | {"flash_attention": False}
        )
        plain.build((2, 6, 8))
        plain.set_weights(layer.get_weights())
        _, scores = plain(X, use_causal_mask=True, return_attention_scores=True, **call)
        np.testing.assert_allclose(found, to_numpy(scores), atol=1e-6)
        assert (found.sum(-1) < 0.99).all()  # the sinks' part

    def test_against_the_definition(self):
        query, key = draw(1, 5, 2, 4), draw(1, 7, 2, 4)
        mask = np.tril(np.ones((5, 7), bool), 1)
        layer = MultiHeadAttention(2, 4, name="attention")
        layer.build((1, 5, 8), (1, 7, 8))
        for dense in (layer.query_dense, layer.key_dense):
            dense.kernel.assign(np.eye(8).reshape(8, 2, 4))
        found = attention_maps(
            layer,
            query.reshape(1, 5, 8),
            value=key.reshape(1, 7, 8),
            attention_mask=masks.Causal(offset=1),
        )
        _, scores = oracle.dot_product_attention(query, key, key, mask=mask)
        np.testing.assert_allclose(found["attention"], scores, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_of_other_dtypes(self, dtype):
        layer = MultiHeadAttention(2, 4, dtype=dtype, name="attention")
        scores = attention_maps(layer, to_tensor(X, dtype))["attention"]
        has_float64 = "64" in str(layer.query_dense.kernel.value.dtype)  # JAX may not
        expected = "float64" if has_float64 else "float32"
        assert scores.dtype == expected
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-6)

    def test_padding_attends_to_nothing_and_gets_nothing(self):
        ids = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
        embedding = keras.layers.Embedding(9, 8, mask_zero=True)
        model = keras.Sequential([embedding, MultiHeadAttention(2, 4)])
        scores = next(iter(attention_maps(model, ids).values()))
        valid = ids != 0
        real = valid[:, None, :, None] & valid[:, None, None, :]
        assert ((scores > 0) == real).all()

    def test_axes_attended_over_are_one_and_the_others_part_of_the_batch(self):
        x = draw(2, 3, 4, 5, 8)  # batch, frames, height, width
        layer = MultiHeadAttention(2, 4, attention_axes=(2, 3), name="attention")
        scores = attention_maps(layer, x)["attention"]
        assert scores.shape == (2 * 3, 2, 4 * 5, 4 * 5)
        alone = MultiHeadAttention(2, 4, attention_axes=(1, 2), name="alone")
        alone.build((2, 4, 5, 8))
        alone.set_weights(layer.get_weights())
        frame = attention_maps(alone, x[:, 2])["alone"]
        np.testing.assert_allclose(
            scores.reshape(2, 3, 2, 20, 20)[:, 2], frame, atol=1e-6
        )


class TestChosenRowsAndHeads:
    def layer(self):
        return MultiHeadAttention(4, 2, position=keras_mha.ALiBi(), name="attention")

    @pytest.mark.parametrize(
        "rows", [3, np.array(3), [-1], [0, 1, 3], [4, 2, 3], [1, 1], []]
    )
    def test_rows(self, rows):
        layer = self.layer()
        call = {
            "attention_bias": draw(2, 4, 6, 6),
            "attention_mask": masks.Causal() & np.tril(np.ones((2, 6, 6), bool)),
            "segment_ids": np.array([[0, 0, 1, 1, 1, 2]] * 2),
        }
        whole = attention_maps(layer, X, **call)["attention"]
        found = attention_maps(layer, X, query_rows=rows, **call)["attention"]
        chosen = whole[:, :, np.atleast_1d(np.array(rows, int))]
        np.testing.assert_allclose(found, chosen, atol=1e-6)
        assert found.shape == chosen.shape

    @pytest.mark.parametrize("heads", [0, [2], [-1, 1]])
    def test_heads(self, heads):
        layer = self.layer()
        whole = attention_maps(layer, X)["attention"]
        found = attention_maps(layer, X, heads=heads)["attention"]
        np.testing.assert_array_equal(found, whole[:, np.atleast_1d(heads)])

    def test_rows_that_are_near_are_worked_out_together(self, monkeypatch):
        layer = MultiHeadAttention(1, 2, name="attention")
        x = draw(1, 64, 4)
        whole = attention_maps(layer, x)["attention"]
        tiles = self.watched_tiles(monkeypatch)
        rows = [2, 4, 10, 40, 41, 63, 62]
        found = attention_maps(layer, x, query_rows=rows)["attention"]
        np.testing.assert_allclose(found, whole[:, :, rows], atol=1e-6)
        assert tiles == [(2, 9), (40, 2), (63, 1), (62, 1)]

    def watched_tiles(self, monkeypatch):
        """The (first row, rows) of each tile worked out from now on."""
        tiles, kernel = [], keras_mha.inspect.reference.attention_weights

        def watched(call, tile):
            if not tile.whole:  # as the layer's own are
                tiles.append((tile.row, tile.rows))
            return kernel(call, tile)

        name = "keras_mha.inspect.reference.attention_weights"
        monkeypatch.setattr(name, watched)
        return tiles

    def test_many_rows_are_worked_out_some_at_a_time(self, monkeypatch):
        layer = self.layer()
        whole = attention_maps(layer, X)["attention"]
        monkeypatch.setattr("keras_mha.inspect._AT_ONCE", 2 * 4 * 6 * 4)
        tiles = self.watched_tiles(monkeypatch)
        found = attention_maps(layer, X)["attention"]
        assert tiles == [(0, 4), (4, 2)]
        np.testing.assert_allclose(found, whole, atol=1e-6)

    def test_a_long_sequence_is_not_held_whole(self):
        layer = MultiHeadAttention(1, 2, name="attention")
        x = draw(1, 20_000, 2)
        scores = attention_maps(layer, x, query_rows=[0, 19_999], use_causal_mask=True)
        assert scores["attention"].shape == (1, 1, 2, 20_000)
        assert scores["attention"][0, 0, 0, 0] == 1


class Counting(keras.layers.Layer):
    """Counts its calls in a weight, adds a loss and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x):
        self.calls.assign_add(1.0)
        self.add_loss(keras.ops.sum(x))
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


class TestNothingIsTouched:
    def model(self):
        inputs = keras.Input((6, 8))
        x = keras.layers.BatchNormalization()(inputs)
        x = Counting()(x)
        x = Block()(x)
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    def test_weights_states_and_losses(self):
        model = self.model()
        model(X)
        weights = [np.array(to_numpy(x)) for x in model.variables]
        losses = [float(x) for x in model.losses]
        attention_maps(model, X)
        for variable, before in zip(model.variables, weights, strict=True):
            np.testing.assert_array_equal(to_numpy(variable), before)
        assert [float(x) for x in model.losses] == losses

    def test_outputs_and_compiled_functions(self):
        inputs = keras.Input((6, 8))
        model = keras.Model(inputs, keras.layers.Dense(3)(Block()(inputs)))
        model.compile("sgd", "mse")
        model.fit(X, draw(2, 6, 3), verbose=0)
        before = model.predict(X, verbose=0)
        functions = model.train_function, model.predict_function
        tensors = model.inputs + model.outputs
        attention_maps(model, X)
        assert functions == (model.train_function, model.predict_function)
        assert model.inputs + model.outputs == tensors
        np.testing.assert_array_equal(model.predict(X, verbose=0), before)

    def test_a_model_never_called_makes_its_weights_first(self):
        model = Subclassed()
        maps = attention_maps(model, X)
        assert model.blocks[0].attention.built
        for path, again in attention_maps(model, X).items():
            np.testing.assert_array_equal(maps[path], again)

    def test_dropout_is_off_unless_training_is_asked_for(self):
        seen = []

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.attention = MultiHeadAttention(2, 4, dropout=0.5)

            def call(self, x, training=None):
                seen.append(training)
                return self.attention(x)

        model = built(Model())
        del seen[:]
        attention_maps(model, X)
        maps = attention_maps(model, X, training=True)
        assert seen == [False, True]
        scores = next(iter(maps.values()))  # before dropout even so
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-6)

    def test_other_threads_are_not_watched(self):
        other = built(Subclassed())

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.attention = MultiHeadAttention(2, 4, name="attention")

            def call(self, x):
                if not isinstance(x, keras.KerasTensor):
                    thread = threading.Thread(target=other, args=(X,))
                    thread.start()
                    thread.join()
                return self.attention(x)

        assert [path.split("/")[-1] for path in attention_maps(Model(), X)] == [
            "attention"
        ]

    def test_a_failing_model_leaves_nothing_watched(self):
        class Failing(keras.Model):
            def call(self, x):
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            attention_maps(Failing(), X)
        from keras_mha.layers import recording

        assert not recording._watchers

    @only_torch
    def test_nothing_is_kept_for_gradients(self):
        import torch

        seen = []

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.attention = MultiHeadAttention(2, 4)

            def call(self, x):
                seen.append(torch.is_grad_enabled())
                return self.attention(x)

        attention_maps(Model(), X)
        assert not any(seen)
        assert torch.is_grad_enabled()


class TestWrongUse:
    def test_a_model_without_the_layer(self):
        model = keras.Sequential([keras.layers.Dense(2)])
        with pytest.raises(ValueError, match=r"`model` must call .*convert_model"):
            attention_maps(model, X)

    def test_no_model(self):
        with pytest.raises(TypeError, match="`model` must be a Keras model or layer"):
            attention_maps(lambda x: x, X)

    def test_placeholders(self):
        with pytest.raises(TypeError, match="`inputs` must be numbers"):
            attention_maps(built(Subclassed()), keras.Input((6, 8)))

    def test_unknown_layers(self):
        model = built(Subclassed())
        with pytest.raises(
            ValueError, match=r"`layers` .*model/last.*Received: 'lost'"
        ):
            attention_maps(model, X, ["last", "lost"])
        with pytest.raises(
            TypeError, match=r"`layers` must be .*Received: 3 \(of type"
        ):
            attention_maps(model, X, 3)
        with pytest.raises(TypeError, match="`layers` must be"):
            attention_maps(model, X, model.blocks[0])

    @pytest.mark.parametrize("name", ["heads", "query_rows"])
    def test_heads_and_rows(self, name):
        layer = MultiHeadAttention(6, 4, name="attention")
        message = rf"`{name}` must be from -6 to 5 for layer 'attention'.*with 6"
        with pytest.raises(ValueError, match=message):
            attention_maps(layer, X, **{name: [0, 6]})
        with pytest.raises(TypeError, match=f"`{name}` must be an integer"):
            attention_maps(layer, X, **{name: 1.5})
        with pytest.raises(TypeError, match=f"`{name}` must be an integer"):
            attention_maps(layer, X, **{name: True})

    def test_a_layer_that_is_vectorised(self):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.block = built(Block())

            def call(self, x):
                return keras.ops.vectorized_map(self.block, x)

        with pytest.raises(ValueError, match=r"numbers cannot be seen.*attention'"):
            attention_maps(Model(), draw(3, 2, 6, 8))

    def test_a_layer_for_every_step_of_time(self):
        layer = keras.layers.TimeDistributed(Block())
        maps = attention_maps(layer, draw(2, 3, 6, 8))
        assert sum(scores.size for scores in maps.values()) == 2 * 3 * 2 * 6 * 6

    @only_jax
    def test_a_layer_in_a_jitted_function(self):
        import jax

        self.check_compiled(jax.jit)

    @only_tensorflow
    def test_a_layer_in_a_tf_function(self):
        import tensorflow as tf

        self.check_compiled(tf.function)

    def check_compiled(self, compiled):
        block = built(Block())

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = block
                self.outer = MultiHeadAttention(2, 4, name="outer")
                self.function = compiled(lambda x: self.inner(x))

            def call(self, x):
                return self.outer(self.function(x))

        model = Model()
        maps = attention_maps(model, X, "outer")
        assert [path.split("/")[-1] for path in maps] == ["outer"]
        with pytest.warns(
            UserWarning, match=r"not seen: '.*attention'\. It did not"
        ) as told:
            assert list(attention_maps(model, X)) == list(maps)
        (warning,) = (x for x in told if "not seen" in str(x.message))
        assert warning.filename == __file__
        model.function = compiled(lambda x: self.again(x))
        self.again = model.inner
        with pytest.raises(ValueError, match=r"numbers cannot be seen.*attention'"):
            attention_maps(model, X)
