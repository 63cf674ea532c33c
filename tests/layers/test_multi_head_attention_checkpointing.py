"""Gradient checkpointing: a pass that is run again drops what it dropped before."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha._keras import set_keras_mask
from tests.helpers import (
    backend_jit,
    only_tensorflow,
    only_torch,
    to_numpy,
    to_tensor,
    with_variables,
)

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 16, 8)).astype("float32")
KINDS = {"torch": ["reentrant", "not reentrant"]}.get(BACKEND, ["plain"])

kinds = pytest.mark.parametrize("kind", KINDS)
not_jax = pytest.mark.skipif(
    BACKEND == "jax",
    reason="JAX refuses by itself, and loudly, a generator that goes on in two "
    "checkpoints of one program",
)


def checkpointed(function, kind):
    """`function`, of which the backend keeps nothing for the gradient."""
    if BACKEND == "torch":
        from torch.utils.checkpoint import checkpoint

        return lambda x: checkpoint(function, x, use_reentrant=kind == "reentrant")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.recompute_grad(function)
    import jax

    return jax.checkpoint(function)


def layers_with(count=1, **arguments):
    keras.utils.set_random_seed(0)
    arguments = {"dropout": 0.5, "seed": 5, **arguments}
    layers = [keras_mha.MultiHeadAttention(2, 4, **arguments) for _ in range(count)]
    for layer in layers:
        layer.build(X.shape)
    return layers


def generators(layers):
    return [layer._dropout_layer.seed_generator for layer in layers]


def gradients(function, layers):
    """Of the sum of squares, by the input and all weights; and where the generators
    of the layers stand then, having started from where they stand now."""
    weights = [weight for layer in layers for weight in layer.trainable_variables]
    states = [to_numpy(generator.state) for generator in generators(layers)]
    found = _GRADIENTS[BACKEND](function, weights)
    after = [to_numpy(generator.state) for generator in generators(layers)]
    for generator, state in zip(generators(layers), states, strict=True):
        generator.state.assign(state)
    return [to_numpy(x) for x in found], after


def _gradients_torch(function, weights):
    x = to_tensor(X).clone().requires_grad_()
    for weight in weights:
        weight.value.grad = None
    function(x).square().sum().backward()
    return [x.grad, *(weight.value.grad for weight in weights)]


def _gradients_tensorflow(function, weights):
    import tensorflow as tf

    x = to_tensor(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(function(x)))
    return tape.gradient(loss, [x, *(weight.value for weight in weights)])


def _gradients_jax(function, weights):
    import jax

    def loss(*tensors):
        return (with_variables(function, weights)(*tensors) ** 2).sum()

    tensors = [to_tensor(X), *(weight.value for weight in weights)]
    return jax.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)


_GRADIENTS = {
    "torch": _gradients_torch,
    "tensorflow": _gradients_tensorflow,
    "jax": _gradients_jax,
}


def assert_same(found, expected):
    """The gradients, and what the generators went on by."""
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- what is run again


@kinds
@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_gradients_are_those_without_a_checkpoint(kind, seed, flash_attention):
    layers = layers_with(seed=seed, flash_attention=flash_attention)

    def attend(x):
        return layers[0](x, training=True)

    expected = gradients(attend, layers)
    assert_same(gradients(checkpointed(attend, kind), layers), expected)


@kinds
def test_several_layers_and_calls_in_one_checkpoint(kind):
    layers = layers_with(2, seed=None)

    def attend(x):
        x = layers[0](x, training=True)
        x = x + layers[1](x, training=True)
        return layers[0](x, training=True)

    expected = gradients(attend, layers)
    assert_same(gradients(checkpointed(attend, kind), layers), expected)


@not_jax
@kinds
def test_checkpoints_one_after_another(kind):
    layers = layers_with(2)

    def block(layer):
        return lambda x: x + layer(x, training=True)

    def attend(x, wrap):
        for layer in (*layers, layers[0]):
            x = wrap(block(layer))(x)
        return x

    expected = gradients(lambda x: attend(x, lambda f: f), layers)
    found = gradients(lambda x: attend(x, lambda f: checkpointed(f, kind)), layers)
    assert_same(found, expected)


@not_jax
@kinds
def test_a_checkpoint_within_a_checkpoint(kind):
    layers = layers_with(2)

    def attend(x, wrap):
        inner = wrap(lambda y: layers[0](y, training=True))

        def outer(y):
            y = inner(layers[1](y, training=True))
            return inner(y) + layers[1](y, training=True)

        return wrap(outer)(x)

    expected = gradients(lambda x: attend(x, lambda f: f), layers)
    found = gradients(lambda x: attend(x, lambda f: checkpointed(f, kind)), layers)
    assert_same(found, expected)


@not_jax
@kinds
def test_micro_batches_differ_and_each_gets_its_own_again(kind):
    layers = layers_with()

    def attend(x, wrap):
        run = wrap(lambda part: layers[0](part, training=True))
        first, again, last = run(x[:1]), run(x[:1]), run(x[1:])
        return keras.ops.concatenate([last, first * again], axis=0)

    expected = gradients(lambda x: attend(x, lambda f: f), layers)
    found = gradients(lambda x: attend(x, lambda f: checkpointed(f, kind)), layers)
    assert_same(found, expected)
    outputs = [to_numpy(layers[0](to_tensor(X), training=True)) for _ in range(2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


@not_jax
@kinds
def test_a_step_after_another_drops_anew(kind):
    layers = layers_with()

    def attend(x):
        return layers[0](x, training=True)

    for _ in range(3):  # the second and third start where the one before ended
        expected = gradients(attend, layers)
        found = gradients(checkpointed(attend, kind), layers)
        assert_same(found, expected)
        for generator, state in zip(generators(layers), found[1], strict=True):
            generator.state.assign(state)


SCOPES = [
    {"mode": "full"},
    {"mode": "activations"},
    {"mode": "larger_than", "output_size_threshold": 16},
    {"mode": "list_of_layers", "layer_names": ["attention", "attention_6"]},
]
scopes = pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope["mode"])
needs_remat_scope = pytest.mark.skipif(
    not hasattr(keras, "RematScope"), reason="this version of Keras has no RematScope"
)


@needs_remat_scope
@scopes
def test_keras_remat_scope(scope):
    layers = layers_with(name="attention")
    expected = gradients(lambda x: layers[0](x, training=True), layers)
    with keras.RematScope(**scope):
        again = layers_with(name="attention")
    found = gradients(lambda x: again[0](x, training=True), again)
    assert_same(found, expected)


def losses_of_fit(scope, dropout):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(X.shape[1:])
    x = keras.layers.Masking()(inputs)
    with keras.RematScope(**scope):
        for seed in (5, 6):
            x = keras_mha.MultiHeadAttention(
                2, 4, dropout=dropout, seed=seed, name=f"attention_{seed}"
            )(x, use_causal_mask=True)
    model = keras.Model(inputs, keras.layers.Dense(8)(x))
    model.compile("sgd", "mse")
    padded = X * (np.arange(16) < 12)[None, :, None]
    history = model.fit(padded, X, epochs=2, batch_size=1, shuffle=False, verbose=0)
    return history.history["loss"]


@needs_remat_scope
@scopes
def test_fit_under_a_remat_scope_is_fit_without(scope):
    expected = losses_of_fit({"mode": None}, 0.5)
    np.testing.assert_allclose(losses_of_fit(scope, 0.5), expected, rtol=1e-5)


@needs_remat_scope
@scopes
def test_the_mask_that_a_tensor_carries_comes_into_a_remat_scope(scope):
    mask = to_tensor(np.arange(16) < np.array([[5], [16]]))
    (layer,) = layers_with(name="attention", dropout=0.0)
    with keras.RematScope(**scope):
        (again,) = layers_with(name="attention", dropout=0.0)

    def attend(layer):
        def run(x):
            x = x * 1.0
            set_keras_mask(x, mask)
            return layer(x)

        return run

    weights = layer.trainable_variables, again.trainable_variables
    expected, found = (
        _GRADIENTS[BACKEND](attend(one), each)
        for one, each in zip((layer, again), weights, strict=True)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=1e-4)


class Doubled(keras_mha.MultiHeadAttention):
    """A subclass with a call of its own, in which dropout draws twice."""

    def call(self, x, *args, **kwargs):
        return super().call(x, *args, **kwargs) + super().call(x, *args, **kwargs)


@needs_remat_scope
@pytest.mark.skipif(BACKEND == "jax", reason="a generator cannot leave the scope")
def test_a_subclass_with_a_call_of_its_own_under_a_remat_scope():
    with keras.RematScope(mode="full"):
        layer = Doubled(2, 4, dropout=0.5, seed=5)
    layer.build(X.shape)
    plain = Doubled(2, 4, dropout=0.5, seed=5)
    plain.build(X.shape)
    plain.set_weights(layer.get_weights())
    expected = gradients(lambda x: plain(x, training=True), [plain])
    assert_same(gradients(lambda x: layer(x, training=True), [layer]), expected)


@pytest.mark.parametrize("flash", [None, True])
def test_training_may_be_known_only_when_a_program_runs(flash):
    (layer,) = layers_with(flash_attention=flash)
    (generator,) = generators([layer])
    state = to_numpy(generator.state)
    # Without a generator's state to go on: a program of JAX keeps none.
    run = backend_jit(lambda x, training: layer(x, training=training))
    found = {}
    for training in (True, False):
        generator.state.assign(state)
        expected = to_numpy(layer(to_tensor(X), training=training))
        generator.state.assign(state)
        found[training] = to_numpy(run(to_tensor(X), to_tensor(np.array(training))))
        generator.state.assign(state)
        np.testing.assert_allclose(found[training], expected, atol=1e-5)
    assert np.abs(found[True] - found[False]).max() > 0.1


def test_training_may_be_known_late_without_dropout():
    (layer,) = layers_with(dropout=0.0)
    run = backend_jit(lambda x, training: layer(x, training=training))
    found = run(to_tensor(X), to_tensor(np.array(True)))
    np.testing.assert_allclose(to_numpy(found), to_numpy(layer(X)), atol=1e-5)


# ---------------------------------------------------------------- TensorFlow


@only_tensorflow
@pytest.mark.parametrize("xla", [False, True])
def test_a_compiled_step(xla):
    import tensorflow as tf

    layers = layers_with()
    weights = [weight.value for weight in layers[0].trainable_variables]

    def attend(x):
        return layers[0](x, training=True) + layers[0](x, training=True)

    @tf.function(jit_compile=xla)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.recompute_grad(attend)(x) * tf.recompute_grad(attend)(x)
            loss = tf.reduce_sum(tf.square(y))
        return tape.gradient(loss, [x, *weights])

    expected, _ = gradients(lambda x: attend(x) * attend(x), layers)
    # That of the key's bias is 0, but for what rounding leaves of large numbers.
    most = max(np.abs(x).max() for x in expected)
    for one, other in zip(step(to_tensor(X)), expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5, atol=1e-6 * most)


@only_tensorflow
def test_a_tape_asked_twice():
    import tensorflow as tf

    layers, x = layers_with(), to_tensor(X)
    run = tf.recompute_grad(lambda z: layers[0](z, training=True))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(run(x)))
    first, second = tape.gradient(loss, x), tape.gradient(loss, x)
    np.testing.assert_array_equal(to_numpy(first), to_numpy(second))


@only_tensorflow
def test_what_cannot_be_known_is_said():
    import tensorflow as tf

    layers, x = layers_with(), to_tensor(X)
    run = tf.recompute_grad(tf.function(lambda z: layers[0](z, training=True)))
    with pytest.raises(RuntimeError, match="loop within the function"):
        run(x)


# ---------------------------------------------------------------- PyTorch


@only_torch
@kinds
def test_a_random_state_that_is_not_restored_is_refused(kind):
    from torch.utils.checkpoint import checkpoint

    layers, x = layers_with(), to_tensor(X).requires_grad_()
    y = checkpoint(
        lambda z: layers[0](z, training=True),
        x,
        use_reentrant=kind == "reentrant",
        preserve_rng_state=False,
    )
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        y.sum().backward()


@only_torch
def test_torchs_own_seed_set_again_repeats_no_dropout():
    import torch

    layers, x, outputs = layers_with(), to_tensor(X), []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(to_numpy(layers[0](x, training=True)))
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


@only_torch
def test_a_gradient_that_is_run_twice():
    from torch.utils.checkpoint import checkpoint

    layers, x = layers_with(), to_tensor(X).requires_grad_()
    y = checkpoint(lambda z: layers[0](z, training=True), x, use_reentrant=False)
    found = []
    for _ in range(2):
        x.grad = None
        y.square().sum().backward(retain_graph=True)
        found.append(to_numpy(x.grad))
    np.testing.assert_array_equal(found[0], found[1])


@only_torch
@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_only_one_of_the_two_passes_is_compiled(first):
    """As where the compiler gives up after so many programs. (What is not reentrant
    torch itself refuses then.)"""
    layers, passes = layers_with(), []

    def attend(x):
        return layers[0](x, training=True)

    compiled = backend_jit(attend)

    def either(x):
        passes.append(x)
        return (compiled if (len(passes) == 1) == first else attend)(x)

    found = gradients(checkpointed(either, "reentrant"), layers)
    assert len(passes) == 2
    assert_same(found, gradients(attend, layers))


@only_torch
@kinds
@pytest.mark.parametrize("inside", [True, False], ids=["within", "around"])
def test_a_compiler_around_or_within_the_checkpoint(kind, inside):
    layers = layers_with()

    def attend(x):
        return layers[0](x, training=True)

    if inside:
        found = gradients(checkpointed(backend_jit(attend), kind), layers)
    else:
        found = gradients(backend_jit(checkpointed(attend, kind)), layers)
    assert_same(found, gradients(attend, layers))
