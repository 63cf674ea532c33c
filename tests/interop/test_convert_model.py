"""A copy of a model that holds our layer wherever the model held Keras's."""

import collections
import functools
import types

import keras
import numpy as np
import pytest
from keras import layers

import keras_mha
from keras_mha import interop
from tests.helpers import only_tensorflow, only_torch

fails_in_keras_3_7 = pytest.mark.skipif(
    keras.__version__.startswith("3.7"), reason="Keras 3.7's own model fails"
)
OLD = (layers.MultiHeadAttention, layers.GroupQueryAttention)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numbers(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


def largest_difference(a, b):
    return max(
        np.abs(
            np.asarray(keras.ops.convert_to_numpy(x), "float64")
            - np.asarray(keras.ops.convert_to_numpy(y), "float64")
        ).max()
        for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True)
    )


def with_random_weights(model):
    for i, variable in enumerate(model.weights):
        if variable.dtype.startswith("float"):
            variable.assign(np.abs(normal(*variable.shape, seed=i)) * 0.2)
    return model


def layers_of(model, kinds):
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


def called(model, data):
    return model(data)


def predicted(model, data):
    return model.predict(data, verbose=0)  # compiled, which is quicker for large ones


def check(model, data, replaced, tolerance=1e-5, run=called):
    """Converts a model and checks what holds for every one of them."""
    want = run(model, data)
    before = [numbers(variable) for variable in model.variables]
    new, report = interop.convert_model(model)

    assert largest_difference(want, run(new, data)) <= tolerance
    assert len(report.replaced) == replaced
    assert len(layers_of(new, keras_mha.MultiHeadAttention)) == replaced
    assert type(new) is type(model) and new.name == model.name
    assert [x.name for x in new.layers] == [x.name for x in model.layers]
    for a, b in zip(model.weights, new.weights, strict=True):
        assert (a.path, a.dtype, a.trainable) == (b.path, b.dtype, b.trainable)

    # Nothing is shared with the original, which is what it was.
    held = {id(x) for x in (*model.variables, *model._flatten_layers())}
    assert not held & {id(x) for x in (*new.variables, *new._flatten_layers())}
    for variable in new.variables:
        if "float" in variable.dtype:
            variable.assign(numbers(variable) + 1)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numbers(variable), value)
    return report


class Block(layers.Layer):
    """Attention in an attribute, in a list and in a dictionary of lists."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention
        self.listed = [layers.MultiHeadAttention(2, 4, name="listed")]
        self.named = {"a": [layers.GroupQueryAttention(4, 4, 2, name="named")]}
        self.norm = layers.LayerNormalization()

    def call(self, x, training=None):
        x = x + self.attention(x, x, training=training)
        x = x + self.listed[0](x, x, use_causal_mask=True)
        return self.norm(x + self.named["a"][0](x, x))


class Subclassed(keras.Model):
    """A model without a configuration, of layers made elsewhere."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.out = layers.Dense(3)

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x, training=training)
        return self.out(x)


def functional(name="functional"):
    x = keras.Input((None, 16))
    y = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x, use_causal_mask=True)
    y = keras.ops.add(y, x) * 2.0
    y, scores = layers.MultiHeadAttention(4, 4)(y, x, return_attention_scores=True)
    return keras.Model(x, {"y": layers.BatchNormalization()(y), "s": scores}, name=name)


class TestKindsOfModels:
    def test_functional(self):
        check(with_random_weights(functional()), normal(2, 5, 16), replaced=2)

    def test_sequential(self):
        model = keras.Sequential(
            [keras.Input((5, 16)), Block(layers.MultiHeadAttention(2, 4))]
        )
        check(with_random_weights(model), normal(2, 5, 16), replaced=3)

    def test_sequential_that_learned_its_shape_in_a_call(self):
        model = keras.Sequential(
            [layers.Dense(16), Block(layers.MultiHeadAttention(2, 4))]
        )
        model(normal(2, 5, 8))
        check(with_random_weights(model), normal(2, 5, 8), replaced=3)

    def test_subclassed_without_a_configuration(self):
        model = Subclassed([Block(layers.MultiHeadAttention(2, 4)) for _ in range(2)])
        model(normal(2, 5, 16))
        check(with_random_weights(model), normal(2, 5, 16), replaced=6)

    def test_models_in_models(self):
        x = keras.Input((5, 16))
        inner = keras.Sequential([keras.Input((5, 16)), layers.Dense(16)])
        inner.add(Block(layers.GroupQueryAttention(4, 4, 2)))
        y = layers.Add()([functional("inner")(x)["y"], inner(x)])
        check(
            with_random_weights(keras.Model(x, y)),
            normal(2, 5, 16),
            replaced=5,
        )

    @fails_in_keras_3_7
    def test_several_inputs_by_name_one_of_them_optional(self):
        class Reader(layers.Layer):
            def __init__(self):
                super().__init__()
                self.attention = layers.MultiHeadAttention(2, 4)

            def call(self, x, memory=None):
                return self.attention(x, x if memory is None else memory)

            def compute_output_shape(self, x_shape, memory_shape=None):
                return x_shape

        x = keras.Input((5, 16), name="x")
        memory = keras.Input((7, 16), name="memory", optional=True)
        model = keras.Model({"x": x, "memory": memory}, Reader()(x, memory))
        new, _ = interop.convert_model(model)
        for given in (normal(2, 7, 16, seed=1), None):
            data = {"x": normal(2, 5, 16), "memory": given}
            assert largest_difference(model(data), new(data)) <= 1e-5

    def test_a_functional_models_subclass_keeps_its_class_and_attributes(self):
        class Encoder(keras.Model):
            def __init__(self, width):
                x = keras.Input((5, width))
                attention = layers.MultiHeadAttention(2, 4)
                hidden = attention(x, x)
                super().__init__(x, layers.Dense(3)(hidden), name="encoder")
                self.width = width
                self.attention = attention
                self.hidden = hidden

        model = Encoder(16)
        check(model, normal(2, 5, 16), replaced=1)
        new, _ = interop.convert_model(model)
        assert new.width == 16
        assert new.attention is new.layers[1]
        inner = keras.Model(new.input, new.hidden)
        assert new.attention in inner.layers
        assert model.attention not in inner.layers

    def test_a_layer_alone(self):
        new, report = interop.convert_model(layers.MultiHeadAttention(2, 4))
        assert isinstance(new, keras_mha.MultiHeadAttention)
        assert len(report.replaced) == 1

    def test_a_model_without_weights_yet(self):
        model = Subclassed([Block(layers.MultiHeadAttention(2, 4))])
        new, report = interop.convert_model(model)
        assert len(report.replaced) == 3
        assert tuple(new(normal(2, 5, 16)).shape) == (2, 5, 3)
        assert not model.built

    def test_a_model_without_attention(self):
        x = keras.Input((5, 16))
        y = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
        y = layers.TimeDistributed(layers.Dense(6))(y)
        y = layers.RNN(layers.GRUCell(4))(y)
        report = check(keras.Model(x, y), normal(2, 5, 16), replaced=0)
        assert report.left_alone == {}


class TestSharing:
    def test_a_layer_of_several_blocks_stays_one(self):
        attention = layers.MultiHeadAttention(2, 4)
        model = Subclassed([Block(attention), Block(attention)])
        model(normal(2, 5, 16))
        check(model, normal(2, 5, 16), replaced=5)
        new, _ = interop.convert_model(model)
        assert new.blocks[0].attention is new.blocks[1].attention

    def test_a_layer_called_twice_stays_one(self):
        x = keras.Input((5, 16))
        attention = layers.MultiHeadAttention(2, 4)
        y = attention(attention(x, x), x, use_causal_mask=True)
        check(keras.Model(x, y), normal(2, 5, 16), replaced=1)

    def test_a_graphs_layer_that_another_layer_holds_stays_one(self):
        attention = layers.MultiHeadAttention(2, 4)
        x = keras.Input((5, 16))
        y = Block(attention)(attention(x, x))
        model = keras.Model(x, y)
        check(model, normal(2, 5, 16), replaced=3)
        new, _ = interop.convert_model(model)
        assert new.layers[-1].attention is new.layers[1]

    def test_what_points_back_points_to_the_copy(self):
        block = Block(layers.MultiHeadAttention(2, 4))
        block.listed[0].owners = (block,)
        block.norm.owners = (block,)
        new, _ = interop.convert_model(block)
        assert new.norm.owners[0] is new

    def test_methods_and_closures_work_on_the_copy(self):
        class Indirect(layers.Layer):
            def __init__(self):
                super().__init__()
                attention = layers.MultiHeadAttention(2, 4)
                self.attention = attention
                self.closure = lambda x: attention(x, x)
                self.method = self.closure_and_more
                self.partial = functools.partial(self.method, factor=2.0)

            def closure_and_more(self, x, factor=1.0):
                return factor * self.closure(x)

            def call(self, x):
                return self.method(x) + self.partial(x)

        layer = Indirect()
        x = normal(2, 5, 16)
        want = layer(x)
        new, _ = interop.convert_model(layer)
        assert largest_difference(want, new(x)) <= 1e-5
        for variable in layer.variables:
            variable.assign(numbers(variable) * 0)
        assert largest_difference(want, new(x)) <= 1e-5

    def test_objects_of_a_users_own_hold_the_copy(self):
        class Helper:
            def __init__(self, attention):
                self.parts = {"attention": attention}

            def attend(self, x):
                return self.parts["attention"](x, x)

        class Words:
            def __init__(self):
                self.words = ["a", "b"]

        class Helped(layers.Layer):
            def __init__(self):
                super().__init__()
                self.attention = layers.MultiHeadAttention(2, 4)
                self.helper = Helper(self.attention)
                self.words = Words()

            def call(self, x):
                return self.helper.attend(x)

        layer = Helped()
        layer(normal(2, 5, 16))
        new, report = interop.convert_model(layer)
        assert new.helper is not layer.helper
        assert new.helper.parts["attention"] is new.attention
        assert layer.helper.parts["attention"] is layer.attention
        assert new.words is layer.words
        assert len(report.replaced) == 1

    @pytest.mark.parametrize(
        "hold",
        [
            lambda attention: types.SimpleNamespace(a=attention),
            lambda attention: collections.deque([attention]),
            lambda attention: frozenset([attention]),
            lambda attention: collections.UserList([attention]),
            lambda attention: lambda x, a=attention: a(x, x),
            lambda attention: collections.namedtuple("Pair", "a b")(attention, 1),
        ],
        ids=["namespace", "deque", "frozenset", "UserList", "default", "namedtuple"],
    )
    def test_whatever_holds_a_layer_holds_the_copys(self, hold):
        layer = Block(layers.MultiHeadAttention(2, 4))
        layer.held = hold(layer.attention)
        new, _ = interop.convert_model(layer)  # raises if anything is left over
        assert layers_of(new, OLD) == []

    def test_a_copy_that_would_hold_a_part_of_the_original_is_refused(self):
        layer = Block(layers.MultiHeadAttention(2, 4))
        layer.held = types.MappingProxyType({"attention": layer.attention})
        with pytest.raises(ValueError, match=r"`model` holds a part.*mappingproxy"):
            interop.convert_model(layer)

    def test_what_keras_does_not_track_is_not_tracked(self):
        layer = Block(layers.MultiHeadAttention(2, 4))
        object.__setattr__(layer.norm, "owner", layer)
        vars(layer)["untracked"] = [layers.Dense(2)]
        new, _ = interop.convert_model(layer)
        assert new.norm.owner is new
        assert type(new.untracked) is list
        assert len(new._flatten_layers()) == len(layer._flatten_layers())

    def test_a_tensor_of_the_graph_is_the_copys(self):
        class Taps(keras.Model):
            def __init__(self):
                dense = layers.Dense(16)
                dense(keras.Input((5, 16)))  # a node of another graph
                x = keras.Input((5, 16))
                first = dense(x)
                second = layers.MultiHeadAttention(2, 4)(dense(first), first)
                super().__init__(x, second)
                self.taps = {"first": first, "second": second}

        model = with_random_weights(Taps())
        new, _ = interop.convert_model(model)
        x = normal(2, 5, 16)
        a, b = (keras.Model(m.input, m.taps)(x) for m in (model, new))
        assert largest_difference(a, b) <= 1e-5

    @only_torch
    def test_weights_of_torchs_own_are_refused(self):
        import torch

        model = Subclassed([keras.layers.TorchModuleWrapper(torch.nn.Linear(4, 4))])
        with pytest.raises(ValueError, match=r"`model` holds weights of a backend's"):
            interop.convert_model(model)

    @only_torch
    def test_modules_of_torch_are_refused_in_objects_too(self):
        import torch

        class Own(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(2))

        layer = Block(layers.MultiHeadAttention(2, 4))
        layer.helper = types.SimpleNamespace(module=Own())
        with pytest.raises(ValueError, match=r"`model` holds weights of a backend's"):
            interop.convert_model(layer)

    @only_tensorflow
    def test_a_compiled_function_of_the_model_is_refused(self):
        import tensorflow as tf

        class Compiled(layers.Layer):
            def __init__(self):
                super().__init__()
                self.attention = layers.MultiHeadAttention(2, 4)
                self.step = tf.function(self.attend)

            def attend(self, x):
                return self.attention(x, x)

        with pytest.raises(ValueError, match="`model` holds a compiled or cached"):
            interop.convert_model(Compiled())


def backends_variable(value):
    """A variable as the masked autoencoder of keras.io holds one."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.Variable(value)
    import torch

    return torch.nn.Parameter(torch.tensor(value))


HOLDERS = {
    "attribute": (lambda x: x, lambda x: x),
    "list": (lambda x: [x], lambda x: x[0]),
    "dictionary": (lambda x: {"token": x}, lambda x: x["token"]),
    "object": (lambda x: types.SimpleNamespace(token=x), lambda x: x.token),
}


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has no variables of its own"
)
class TestVariablesOfABackend:
    """Those that Keras does not know of are copied too."""

    @staticmethod
    def layer_with(held):
        class Encoder(layers.Layer):
            def __init__(self):
                super().__init__()
                self.attention = layers.MultiHeadAttention(2, 4)
                self.held = held

        return Encoder()

    @pytest.mark.parametrize("holder", HOLDERS)
    def test_wherever_they_are_held(self, holder):
        hold, held = HOLDERS[holder]
        layer = self.layer_with(hold(backends_variable([1.0, 2.0])))
        new, _ = interop.convert_model(layer)
        old, copy = held(layer.held), held(new.held)
        assert type(copy) is type(old)
        assert copy is not old
        old_numbers = keras.ops.convert_to_numpy(old)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(copy), [1, 2])
        new_numbers = backends_variable([5.0, 6.0])
        if keras.backend.backend() == "tensorflow":
            copy.assign(new_numbers)
        else:
            copy.data.copy_(new_numbers.data)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(copy), [5, 6])
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(old), old_numbers)

    def test_one_held_twice_stays_one(self):
        variable = backends_variable([1.0])
        layer = self.layer_with([variable, variable])
        new, _ = interop.convert_model(layer)
        assert new.held[0] is new.held[1]

    def test_what_is_behind_a_variable_of_keras_stays_so(self):
        dense = layers.Dense(2)
        dense.build((None, 3))
        # What holds the tensor may come before or after the layer.
        layer = self.layer_with([dense.kernel.value, dense, dense.bias.value])
        new, _ = interop.convert_model(layer)
        kernel, dense, bias = new.held
        assert kernel is dense.kernel.value
        assert bias is dense.bias.value

    @only_tensorflow
    def test_all_that_tensorflow_knows_of_one(self):
        import tensorflow as tf

        names = ("name", "shape", "trainable", "constraint", "aggregation")
        variable = tf.Variable(
            ["a", "b"],
            name="x/y",
            shape=[None],
            trainable=False,
            aggregation=tf.VariableAggregation.SUM,
        )
        layer = self.layer_with(variable)
        new, _ = interop.convert_model(layer)
        for name in names:
            assert getattr(new.held, name) == getattr(variable, name)
        assert "held" in new._trackable_children()

    @only_torch
    def test_torch_knows_the_copy(self):
        layer = self.layer_with(backends_variable([1.0]).requires_grad_(False))
        new, _ = interop.convert_model(layer)
        assert dict(new.named_parameters())["held"] is new.held
        assert not new.held.requires_grad


class TestPositions:
    def test_a_position_that_layers_of_ours_share_stays_one(self):
        position = keras_mha.RelativePositionBias()
        x = keras.Input((5, 16))
        y = layers.MultiHeadAttention(2, 4)(x, x)
        for _ in range(2):
            y = keras_mha.MultiHeadAttention(2, 4, position=position)(y)
        model = with_random_weights(keras.Model(x, y))
        new, _ = interop.convert_model(model)
        assert len(new.weights) == len(model.weights)
        old = [layer.get_config() for layer in model.layers[2:]]
        assert [layer.get_config() for layer in new.layers[2:]] == old
        data = normal(2, 5, 16)
        clone = keras.models.clone_model(new)
        clone.set_weights(model.get_weights())
        assert largest_difference(model(data), clone(data)) <= 1e-5
        assert clone.layers[2].position is clone.layers[3].position
        assert clone.layers[2].position is not new.layers[2].position


class TestState:
    def test_trainable_flags(self):
        model = functional()
        model.layers[1].trainable = False
        attention = layers_of(model, OLD)[1]
        attention._key_dense.trainable = False
        attention._value_dense.kernel.trainable = False
        check(model, normal(2, 5, 16), replaced=2)
        new, _ = interop.convert_model(model)
        assert [x.path for x in new.trainable_variables] == [
            x.path for x in model.trainable_variables
        ]
        assert new.layers[1].trainable is False

    def test_dtype_policies(self):
        x = keras.Input((5, 16))
        y = layers.MultiHeadAttention(2, 4, dtype="mixed_bfloat16")(x, x)
        y = layers.MultiHeadAttention(2, 4, dtype="float32")(y, y)
        model = keras.Model(x, layers.Dense(4, dtype="bfloat16")(y))
        check(model, normal(2, 5, 16), replaced=2, tolerance=0.05)
        new, _ = interop.convert_model(model)
        for a, b in zip(model.layers, new.layers, strict=True):
            assert a.dtype_policy == b.dtype_policy

    def test_lora(self):
        x = keras.Input((5, 16))
        model = keras.Model(x, layers.MultiHeadAttention(2, 4)(x, x))
        for dense in layers_of(model, layers.EinsumDense):
            dense._tracker.unlock()
            dense.enable_lora(2)
        check(with_random_weights(model), normal(2, 5, 16), replaced=1)

    @fails_in_keras_3_7
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_int8(self):
        x = keras.Input((5, 16))
        model = keras.Model(x, layers.Dense(4)(layers.MultiHeadAttention(2, 4)(x, x)))
        model.quantize("int8")
        want = model(normal(2, 5, 16))
        new, report = interop.convert_model(model)
        assert largest_difference(want, new(normal(2, 5, 16))) <= 1e-5
        assert len(report.replaced) == 1
        assert [x.dtype for x in model.weights] == [x.dtype for x in new.weights]

    def test_dropouts_random_numbers(self):
        model = Subclassed([Block(layers.MultiHeadAttention(2, 4, dropout=0.5))])
        model(normal(2, 5, 16), training=True)
        new, _ = interop.convert_model(model)
        state = [x for x in model.variables if "seed" in x.name]
        copies = [x for x in new.variables if "seed" in x.name]
        assert state
        for a, b in zip(state, copies, strict=True):
            np.testing.assert_array_equal(numbers(a), numbers(b))

    def test_a_stateful_layers_state(self, tmp_path):
        x = keras.Input((5, 16), batch_size=2)
        y = layers.LSTM(16, stateful=True, return_sequences=True)(x)
        model = keras.Model(x, layers.MultiHeadAttention(2, 4)(y, y))
        data = normal(2, 5, 16)
        model(data)
        new, _ = interop.convert_model(model)
        assert len(new.weights) == len(model.weights)
        assert largest_difference(model(data), new(data)) <= 1e-5
        new.save_weights(tmp_path / "new.weights.h5")
        model.load_weights(tmp_path / "new.weights.h5")

    def test_regularizers_and_constraints_of_a_variable(self):
        model = functional()
        kernel = layers_of(model, OLD)[0]._query_dense.kernel
        kernel.regularizer = keras.regularizers.L2(0.5)
        kernel.constraint = keras.constraints.UnitNorm()
        new, _ = interop.convert_model(model)
        assert len(new.losses) == len(model.losses) == 1
        copy = new.layers[1].query_dense.kernel
        assert copy.constraint is kernel.constraint

    def test_regularizers_and_constraints(self):
        x = keras.Input((5, 16))
        y = layers.MultiHeadAttention(2, 4, kernel_regularizer="l2")(x, x)
        y = layers.Dense(4, kernel_regularizer="l1", kernel_constraint="unit_norm")(y)
        model = with_random_weights(keras.Model(x, y))
        new, _ = interop.convert_model(model)
        assert largest_difference(sum(model.losses), sum(new.losses)) <= 1e-4
        constraint = new.layers[-1].kernel.constraint
        assert isinstance(constraint, keras.constraints.UnitNorm)

    def test_files_go_both_ways(self, tmp_path):
        model = with_random_weights(functional())
        new, _ = interop.convert_model(model)
        x = normal(2, 5, 16)
        new.save(tmp_path / "new.keras")
        again = keras.saving.load_model(tmp_path / "new.keras")
        assert largest_difference(new(x), again(x)) <= 1e-6
        model.save_weights(tmp_path / "old.weights.h5")
        for variable in new.weights:
            variable.assign(numbers(variable) * 0)
        new.load_weights(tmp_path / "old.weights.h5")
        assert largest_difference(model(x), new(x)) <= 1e-5


def mean_of_squares(y, prediction):
    return keras.ops.mean(keras.ops.square(y - prediction))


class TestCompileState:
    def model(self):
        model = Subclassed([Block(layers.MultiHeadAttention(2, 4))])
        model.compile(
            # A key's bias has no gradient but rounding noise, which Adam with its usual
            # epsilon would blow up to steps as large as any.
            keras.optimizers.Adam(1e-2, epsilon=1e-3),
            # Neither has a configuration that could be written down.
            loss=lambda y, prediction: mean_of_squares(y, prediction),
            metrics=["mae", keras.metrics.MeanSquaredError()],
        )
        return model

    def test_training_goes_on_as_it_would_have(self):
        model, x, y = self.model(), normal(4, 5, 16), normal(4, 5, 3, seed=1)
        model.fit(x, y, epochs=2, verbose=0, shuffle=False)
        new, _ = interop.convert_model(model)
        before = [numbers(variable) for variable in model.variables]
        for a, b in zip(
            model.optimizer.variables, new.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(numbers(a), numbers(b))
        np.testing.assert_allclose(
            new.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-5
        )

        new.fit(x, y, epochs=2, verbose=0, shuffle=False)
        for variable, value in zip(model.variables, before, strict=True):
            if "metric" not in variable.path:
                np.testing.assert_array_equal(numbers(variable), value)
        model.fit(x, y, epochs=2, verbose=0, shuffle=False)
        for a, b in zip(model.weights, new.weights, strict=True):
            np.testing.assert_allclose(numbers(a), numbers(b), atol=1e-4)

    def test_a_compile_of_its_own(self):
        class Own(Subclassed):
            def compile(self, first, loss):
                super().compile(optimizer=first, loss=loss)
                self.again = loss

        model = Own([Block(layers.MultiHeadAttention(2, 4))])
        model(normal(2, 5, 16))
        model.compile(keras.optimizers.SGD(0.5), loss="mse")
        new, _ = interop.convert_model(model)
        assert new.again == "mse" and new.loss == "mse"
        assert new.optimizer is not model.optimizer
        assert isinstance(new.optimizer, keras.optimizers.SGD)
        new.fit(normal(2, 5, 16), normal(2, 5, 3), verbose=0)

    def test_metrics_and_optimizers_in_attributes(self):
        model = Subclassed([Block(layers.MultiHeadAttention(2, 4))])
        model.tracker = keras.metrics.Mean()
        model.second = keras.optimizers.SGD(0.1, momentum=0.9)
        model(normal(2, 5, 16))
        model.second.build(model.out.trainable_variables)
        model.tracker.update_state(3.0)
        new, _ = interop.convert_model(model)
        assert new.tracker is not model.tracker
        assert float(new.tracker.result()) == 3.0
        assert new.second._trainable_variables[0] is new.out.kernel

    def test_what_was_set_after_compiling(self):
        model = self.model()
        model.run_eagerly = True
        model.steps_per_execution = 2
        new, _ = interop.convert_model(model)
        assert new.run_eagerly and new.steps_per_execution == 2

    def test_an_optimizer_of_any_kind(self):
        class Decay:  # no schedule of Keras's, and no configuration
            def __init__(self, boost):
                self.boost = boost

            def __call__(self):
                return 0.01 * self.boost

        class Boosted(keras.optimizers.SGD):
            def __init__(self, boost):
                super().__init__(Decay(boost), momentum=0.9, weight_decay=0.5)
                self.boost = boost

        model, x, y = self.model(), normal(4, 5, 16), normal(4, 5, 3, seed=1)
        model(x)
        optimizer = Boosted(9.0)
        optimizer.exclude_from_weight_decay(var_list=[model.out.kernel])
        model.compile(optimizer, loss="mse")
        model.fit(x, y, verbose=0)
        new, _ = interop.convert_model(model)
        assert new.optimizer.boost == 9.0
        assert not new.optimizer._use_weight_decay(new.out.kernel)
        assert new.optimizer._use_weight_decay(new.out.bias)
        for each in (model, new):
            each.fit(x, y, epochs=2, verbose=0, shuffle=False)
        for a, b in zip(model.weights, new.weights, strict=True):
            np.testing.assert_allclose(numbers(a), numbers(b), atol=1e-4)

    def test_a_loss_of_the_models_own_weights(self):
        model = self.model()
        model(normal(2, 5, 16))
        kernel = model.out.kernel
        model.compile("sgd", loss=lambda y, p: keras.ops.sum(kernel) + 0 * y + 0 * p)
        new, _ = interop.convert_model(model)
        x, y = normal(2, 5, 16), normal(2, 5, 3)
        before = new.evaluate(x, y, verbose=0)
        kernel.assign(numbers(kernel) + 1)
        assert new.evaluate(x, y, verbose=0) == pytest.approx(before)

    def test_a_metric_without_a_configuration(self):
        class Odd(keras.metrics.Mean):
            def __init__(self, factor):
                super().__init__()
                self.factor = factor

        model = self.model()
        model.odd = Odd(3)
        model.odd.update_state(2.0)
        new, _ = interop.convert_model(model)
        assert new.odd.factor == 3 and float(new.odd.result()) == 2.0
        new.odd.reset_state()
        assert float(model.odd.result()) == 2.0

    def test_nothing_of_the_training_holds_the_original(self):
        model = self.model()
        model.fit(normal(2, 5, 16), normal(2, 5, 3), verbose=0)
        assert model.history is not None
        model.blocks[0].history = ["a layer's own"]
        new, _ = interop.convert_model(model)
        assert new.history is None
        assert new.blocks[0].history == ["a layer's own"]

    def test_a_model_that_is_not_compiled_stays_so(self):
        new, _ = interop.convert_model(functional())
        assert not new.compiled


class TestReport:
    def test_it_says_what_was_replaced(self):
        model = functional()
        _, report = interop.convert_model(model)
        assert report.replaced == [layer.path for layer in layers_of(model, OLD)]
        assert str(report).startswith("2 attention layers replaced\n  multi_head_atten")

    def test_subclasses_are_left_alone_and_named(self):
        class Cached(layers.MultiHeadAttention):
            def call(self, query, value, key=None, **kwargs):
                return self._output_dense(self._query_dense(query))

        x = keras.Input((5, 16))
        y = Cached(2, 4, name="cached")(x, x)
        y = layers.MultiHeadAttention(2, 4)(y, y)
        model = keras.Model(x, y)
        report = check(model, normal(2, 5, 16), replaced=1)
        assert report.left_alone == {"cached": "a subclass, Cached"}
        assert "1 left alone\n  cached: a subclass, Cached" in str(report)

    def test_what_is_no_model_is_refused(self):
        with pytest.raises(TypeError, match=r"`model` must be a Keras model.*'a'"):
            interop.convert_model("a")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda a, b: setattr(a, "call", lambda x, y: x), "a `call` of its own"),
            (
                lambda a, b: vars(a).update(_query_dense=layers.Dense(3)),
                "a layer with a Dense as projection",
            ),
            (
                lambda a, b: setattr(b._key_dense, "_kernel", a._key_dense._kernel),
                "a layer that shares weights with another",
            ),
        ],
        ids=["call", "projection", "tied"],
    )
    def test_layers_changed_by_hand_are_left_alone(self, change, reason):
        first, second = (layers.MultiHeadAttention(2, 4) for _ in range(2))
        for layer in (first, second):
            layer.build((2, 5, 16), (2, 5, 16))
            for part in (layer, layer._key_dense):
                part._tracker.unlock()
        change(first, second)
        _, report = interop.convert_model(Subclassed([first, second]))
        assert [reason in why for why in report.left_alone.values()] == [True]

    def test_names_of_layers_without_weights_are_kept_apart(self):
        class Cached(layers.MultiHeadAttention):
            pass

        model = Subclassed([Block(Cached(2, 4, name="same")) for _ in range(2)])
        _, report = interop.convert_model(model)
        assert list(report.left_alone) == ["same", "same'"]


SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}


class TestKerasHub:
    """Models of KerasHub, with random weights."""

    @pytest.fixture(autouse=True)
    def hub(self):
        reason = "KerasHub is a peer that the oldest Keras's environment has not"
        self.models = pytest.importorskip("keras_hub", reason=reason).models

    tokens = np.random.default_rng(0).integers(1, 50, (2, 12)).astype("int32")
    valid = np.repeat([[1] * 12, [1] * 8 + [0] * 4], 1, axis=0).astype("int32")

    def bert(self):
        return self.models.BertBackbone(
            vocabulary_size=50,
            intermediate_dim=32,
            max_sequence_length=16,
            **SIZES,
        )

    def test_bert(self):
        data = {
            "token_ids": self.tokens,
            "segment_ids": 0 * self.tokens,
            "padding_mask": self.valid,
        }
        check(with_random_weights(self.bert()), data, replaced=2, run=predicted)

    def test_a_task_with_its_tokenizer(self):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
        tokenizer = self.models.BertTokenizer(vocabulary=words)
        preprocessor = self.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=12
        )
        model = self.models.BertTextClassifier(
            self.bert(), num_classes=3, preprocessor=preprocessor
        )
        new, report = interop.convert_model(model)
        assert len(report.replaced) == 2
        text = ["a b c", "d e"]
        old, new_ = (x.predict(text, verbose=0) for x in (model, new))
        assert np.abs(old - new_).max() <= 1e-5
        assert type(new.optimizer) is type(model.optimizer)
        assert new.backbone in new.layers

    def test_vit(self):
        model = self.models.ViTBackbone(
            image_shape=(16, 16, 3), patch_size=4, mlp_dim=32, **SIZES
        )
        image = normal(2, 16, 16, 3)
        check(with_random_weights(model), image, replaced=2, run=predicted)

    def test_whispers_cached_layers_are_left_alone(self):
        model = self.models.WhisperBackbone(
            vocabulary_size=50,
            intermediate_dim=32,
            num_mels=8,
            max_encoder_sequence_length=12,
            max_decoder_sequence_length=12,
            **SIZES,
        )
        data = {
            "encoder_features": normal(2, 12, 8),
            "decoder_token_ids": self.tokens,
            "decoder_padding_mask": self.valid,
        }
        with_random_weights(model)
        report = check(model, data, replaced=0, run=predicted)
        assert set(report.left_alone.values()) == {
            "a subclass, WhisperCachedMultiHeadAttention"
        }
        assert len(report.left_alone) == 6
