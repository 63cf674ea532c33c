"""Training: dropout and its seed, regularizers, policies, and that it learns."""

import keras
import numpy as np
import pytest

import keras_mha
from tests.helpers import only_jax, only_torch, to_numpy, to_tensor

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 12)).astype("float32")
Y = RNG.normal(size=(2, 4, 10)).astype("float32")

OURS, KERAS = keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention


def layer_with(layer_class=OURS, **arguments):
    keras.utils.set_random_seed(0)
    return layer_class(num_heads=4, key_dim=4, **arguments)


# ---------------------------------------------------------------------- dropout


def trained_outputs(calls=2, **arguments):
    layer = layer_with(dropout=0.5, **arguments)
    x = to_tensor(X)
    return [to_numpy(layer(x, x, training=True)) for _ in range(calls)]


def test_a_seed_repeats_the_same_dropout_call_for_call():
    first, second = trained_outputs(seed=3)
    assert np.abs(first - second).max() > 1e-3
    again = trained_outputs(seed=3)
    np.testing.assert_array_equal(again[0], first)
    np.testing.assert_array_equal(again[1], second)


def test_another_seed_drops_other_weights():
    assert np.abs(trained_outputs(seed=3)[0] - trained_outputs(seed=4)[0]).max() > 1e-3


def test_dropping_everything_leaves_the_output_bias():
    layer = layer_with(dropout=1.0, bias_initializer="ones")
    output = to_numpy(layer(to_tensor(X), training=True))
    np.testing.assert_array_equal(output, np.ones_like(output))


def test_asking_for_the_scores_does_not_change_what_is_dropped():
    x = to_tensor(X)
    without = layer_with(dropout=0.5, seed=3)(x, x, training=True)
    output, scores = layer_with(dropout=0.5, seed=3)(
        x, x, training=True, return_attention_scores=True
    )
    np.testing.assert_array_equal(to_numpy(output), to_numpy(without))
    np.testing.assert_allclose(to_numpy(scores).sum(axis=-1), 1, atol=1e-6)


def test_dropout_is_off_at_inference_and_draws_nothing():
    x = to_tensor(X)
    plain, configured = layer_with(), layer_with(dropout=0.5, seed=3)
    expected, output = plain(x, x), configured(x, x)
    state = to_numpy(configured._dropout_layer.seed_generator.state)
    configured.set_weights(plain.get_weights())
    output = configured(x, x)
    np.testing.assert_array_equal(to_numpy(output), to_numpy(expected))
    after = to_numpy(configured._dropout_layer.seed_generator.state)
    np.testing.assert_array_equal(after, state)


@only_torch
def test_a_configured_dropout_keeps_the_fused_kernel_at_inference():
    x = to_tensor(X)
    layer = layer_with(dropout=0.5, flash_attention=True)
    plain = layer_with()
    expected = plain(x)
    layer(x)
    layer.set_weights(plain.get_weights())
    np.testing.assert_array_equal(to_numpy(layer(x)), to_numpy(expected))


# ---------------------------------------------------------------------- Keras habits


REGULARIZED = {
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
    "activity_regularizer": "l2",
    "bias_initializer": "ones",
}


def test_regularizers_give_the_losses_of_keras_layer():
    losses = []
    for layer_class in (OURS, KERAS):
        layer = layer_with(layer_class, **REGULARIZED)
        layer(to_tensor(X), to_tensor(Y))
        losses.append(sorted(float(to_numpy(loss)) for loss in layer.losses))
    assert len(losses[0]) == 12
    if len(losses[1]) == 8:
        pytest.skip("this version of Keras leaves the activity_regularizer out")
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_constraints_reach_every_projection():
    layer = layer_with(kernel_constraint="non_neg", bias_constraint="max_norm")
    layer.build(X.shape, Y.shape)
    for dense in (
        layer.query_dense,
        layer.key_dense,
        layer.value_dense,
        layer.output_dense,
    ):
        assert isinstance(dense.kernel.constraint, keras.constraints.NonNeg)
        assert isinstance(dense.bias.constraint, keras.constraints.MaxNorm)


def test_each_projection_has_initial_weights_of_its_own():
    layer = layer_with(num_key_value_heads=4)
    layer.build(X.shape)
    kernels = [layer.query_dense, layer.key_dense, layer.value_dense]
    kernels = [to_numpy(dense.kernel) for dense in kernels]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    assert np.abs(kernels[1] - kernels[2]).max() > 1e-3


def test_freezing_the_layer_freezes_its_own_weights_too():
    layer = layer_with(qk_norm="rms", attention_sink="learned")
    layer.build(X.shape)
    assert {weight.name for weight in layer.trainable_weights} >= {
        "query_norm_scale",
        "key_norm_scale",
        "sink",
    }
    layer.trainable = False
    assert layer.trainable_weights == []


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {
            "qk_norm": "layer",
            "attention_sink": "learned",
            "logit_soft_cap": 5.0,
            "use_gate": True,
            "num_key_value_heads": 2,
        },
    ],
    ids=["plain", "everything"],
)
def test_half_precision_policies_compute_and_keep_what_they_should(policy, arguments):
    layer = layer_with(dtype=policy, **arguments)
    output, scores = layer(to_tensor(X), to_tensor(Y), return_attention_scores=True)
    policy = keras.dtype_policies.get(policy)
    for x in (output, scores):
        assert keras.backend.standardize_dtype(x.dtype) == policy.compute_dtype
    for weight in layer.weights:
        assert weight.dtype == policy.variable_dtype
    exact = layer_with(**arguments)
    exact.build(X.shape, Y.shape)
    exact.set_weights(layer.get_weights())
    expected = to_numpy(exact(to_tensor(X), to_tensor(Y)))
    np.testing.assert_allclose(to_numpy(output), expected, atol=0.05)


def test_a_policy_map_gives_a_projection_a_dtype_of_its_own():
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies["attention/query"] = keras.DTypePolicy("mixed_bfloat16")
    layer = layer_with(name="attention", dtype=policies)
    output = layer(to_tensor(X), to_tensor(Y))
    assert layer.query_dense.compute_dtype == "bfloat16"
    assert layer.key_dense.compute_dtype == "float32"
    assert keras.backend.standardize_dtype(output.dtype) == "float32"


# ---------------------------------------------------------------------- learning


def test_a_model_learns_to_look_at_the_token_that_matters():
    """The answer is the token behind the marker: only attention can bring it."""
    generator = np.random.default_rng(1)
    tokens = generator.normal(size=(256, 6, 8)).astype("float32")
    tokens[..., 0] = 0
    marked = generator.integers(0, 6, 256)
    tokens[np.arange(256), marked, 0] = 3
    answers = tokens[np.arange(256), marked, 1:3]

    inputs = keras.Input((6, 8))
    x = layer_with(qk_norm="rms", attention_sink="zero", use_gate=True)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile(optimizer=keras.optimizers.Adam(0.02), loss="mse")
    history = model.fit(tokens, answers, epochs=30, batch_size=64, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.2 * losses[0]
    for weight in model.trainable_weights:
        assert np.isfinite(to_numpy(weight)).all()


# ---------------------------------------------------------------------- distribution

LAYOUTS = {
    ".*query.*kernel": (None, "model", None),
    ".*key.*kernel": (None, "model", None),
    ".*value.*kernel": (None, "model", None),
    ".*attention_output.*kernel": ("model", None, None),
}


@only_jax
def test_a_layout_map_written_for_keras_layer_finds_the_same_variables():
    import jax

    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], jax.devices()[:1])
    layouts = keras.distribution.LayoutMap(mesh)
    for path, axes in LAYOUTS.items():
        layouts[path] = axes

    def found(layer_class):
        layer = layer_with(layer_class, name="attention")
        layer.build(X.shape, Y.shape)
        layouts_found = {w.path: layouts[w.path] for w in layer.weights}
        return {p: layout and layout.axes for p, layout in layouts_found.items()}

    ours = found(OURS)
    assert ours == found(KERAS)
    assert sum(axes is not None for axes in ours.values()) == 4


def test_grouped_heads_train_with_lora():
    layer = layer_with(num_key_value_heads=2)
    x = to_tensor(X)
    expected = to_numpy(layer(x))
    for dense in (layer.key_dense, layer.value_dense):
        dense.enable_lora(2)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-6)
