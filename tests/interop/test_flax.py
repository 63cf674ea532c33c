"""`flax.nnx.MultiHeadAttention` beside ours, whatever Keras runs on."""

import importlib.util

import numpy as np
import pytest

from keras_mha.info import MissingExtra
from keras_mha.interop import from_flax
from tests.helpers import call_at_once, outputs_and_gradients, to_numpy, to_tensor

nnx = pytest.importorskip(
    "flax.nnx", reason="Flax is not installed beside the oldest Keras"
)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 3, 4, 8, 4


def make_module(**options):
    """A module of random weights, its biases and gains too, that draws no dropout."""
    module = nnx.MultiHeadAttention(
        **{"num_heads": HEADS, "in_features": WIDTH, **options},
        kernel_init=nnx.initializers.zeros,  # compiled sooner than random numbers
        decode=False,
        deterministic=True,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    for part in parts(module):
        for name in ("kernel", "bias", "scale"):
            weight = getattr(part, name, None)
            if weight is not None:
                new = rng.normal(size=weight.shape) / 2
                weight[...] = jnp.asarray(new, weight.dtype)
    return module


def parts(module):
    found = [module.query, module.key, module.value, module.out]
    return found + ([module.query_ln, module.key_ln] if module.normalize_qk else [])


def inputs_for(module):
    """Query, key and value, in Flax's order."""
    rng = np.random.default_rng(1)
    widths = module.in_features, module.in_kv_features, module.in_kv_features
    lengths = QUERIES, KEYS, KEYS
    return [
        rng.normal(size=(BATCH, length, width)).astype("float32")
        for length, width in zip(lengths, widths, strict=True)
    ]


@nnx.jit
def run_module(module, inputs, mask=None):
    """The module's output and its scores."""
    output = module(*inputs, mask=mask, sow_weights=True)
    return output, nnx.pop(module, nnx.Intermediate)["attention_weights"][0]


def results(module, layer, mask=None, **masks):
    """Output and scores of the module, and then of the layer."""
    query, key, value = inputs_for(module)
    theirs = run_module(module, (query, key, value), mask)
    ours = call_at_once(
        lambda *x: layer(*x, return_attention_scores=True, **masks),
        [to_tensor(x) for x in (query, value, key)],
    )
    return list(map(np.asarray, theirs)), list(map(to_numpy, ours))


def assert_same(module, layer, mask=None, **masks):
    theirs, ours = results(module, layer, mask, **masks)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


OPTIONS = {
    "plain": {},
    "one head, no bias": {"num_heads": 1, "use_bias": False},
    "features": {"qkv_features": 12, "out_features": 5},
    "one key head of another width": {"num_kv_heads": 1, "in_kv_features": 6},
    "all": {
        "qkv_features": 16,
        "out_features": 5,
        "in_kv_features": 6,
        "num_kv_heads": 2,
        "normalize_qk": True,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_imported_layer_has_the_modules_numbers(options):
    module = make_module(**options)
    assert_same(module, from_flax(module))


def test_mask_is_true_where_ours_is():
    module = make_module()
    mask = np.random.default_rng(2).random((BATCH, HEADS, QUERIES, KEYS)) < 0.5
    mask[..., 1] = True
    assert_same(module, from_flax(module), mask, attention_mask=mask)


def test_causal_mask():
    module = make_module(num_kv_heads=2)
    causal = np.tri(QUERIES, KEYS, dtype="bool")[None, None]
    assert_same(module, from_flax(module), causal, use_causal_mask=True)


def test_query_that_sees_nothing_gives_zeros_here_and_attends_evenly_there():
    module = make_module()
    mask = np.ones((BATCH, 1, QUERIES, KEYS), "bool")
    mask[0] = False
    (theirs, _), (output, _) = results(
        module, from_flax(module), mask, attention_mask=mask
    )
    bias = np.asarray(module.out.bias[...])
    assert np.abs(theirs[0] - bias).max() > 1e-2
    np.testing.assert_allclose(output[0], np.tile(bias, (QUERIES, 1)), atol=1e-6)
    np.testing.assert_allclose(output[1], theirs[1], atol=1e-5)


def test_gradients_of_the_inputs_are_the_modules():
    module = make_module(**OPTIONS["all"])
    arrays = inputs_for(module)
    cotangent = np.random.default_rng(3).normal(size=(BATCH, QUERIES, 5))

    @jax.jit
    def gradients(*inputs):
        return jax.vjp(lambda *x: module(*x), *inputs)[1](jnp.asarray(cotangent, "f4"))

    expected = gradients(*map(jnp.asarray, arrays))
    layer = from_flax(module)
    _, found = outputs_and_gradients(
        lambda query, key, value: layer(query, value, key), arrays, [cotangent]
    )
    for gradient, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, np.asarray(theirs), atol=1e-5)


# ------------------------------------------------------------------ what is taken over


def test_options_are_taken_over():
    layer = from_flax(make_module(num_kv_heads=2, dropout_rate=0.25, qkv_features=12))
    assert layer.num_heads == HEADS
    assert layer.num_key_value_heads == 2
    assert layer.key_dim == layer.value_dim == 3
    assert layer.dropout == 0.25


def test_missing_biases_are_missing_here_too():
    layer = from_flax(make_module(use_bias=False))
    assert not layer.use_bias
    assert len(layer.weights) == 4


def test_normalisation_is_taken_over():
    module = make_module(normalize_qk=True)
    layer = from_flax(module)
    config = layer.get_config()
    assert config["qk_norm"] == "layer"
    assert config.get("qk_norm_epsilon", 1e-6) == module.query_ln.epsilon
    for ours, theirs in (
        (layer.query_norm_scale, module.query_ln.scale),
        (layer.key_norm_scale, module.key_ln.scale),
    ):
        np.testing.assert_array_equal(to_numpy(ours), np.asarray(theirs[...]))


def test_module_of_half_precision():
    module = make_module(param_dtype=jnp.bfloat16, normalize_qk=True)
    layer = from_flax(module)
    assert layer.compute_dtype == "float32"
    for ours, theirs in (
        (layer.key_dense.kernel, module.key.kernel),
        (layer.output_dense.bias, module.out.bias),
        (layer.key_norm_scale, module.key_ln.scale),
    ):
        expected = np.asarray(theirs[...], "float32")
        np.testing.assert_array_equal(to_numpy(ours), expected)


def test_names_and_dtypes_are_as_for_any_layer():
    layer = from_flax(
        make_module(), name="attention", dtype="mixed_float16", trainable=False
    )
    assert layer.name == "attention"
    assert layer.compute_dtype == "float16"
    assert not layer.trainable_weights


def test_module_stays_as_it_was():
    module = make_module(normalize_qk=True)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    layer = from_flax(module)
    layer.set_weights([np.zeros_like(x) for x in layer.get_weights()])
    after = nnx.to_pure_dict(nnx.state(module))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_module_with_a_cache_for_decoding_gives_its_weights():
    module = make_module()
    module.init_cache((BATCH, KEYS, WIDTH))
    assert_same(module, from_flax(module))


# ------------------------------------------------------------------ wrong use


def test_attention_function_of_its_own_is_refused_by_name():
    def attention_fn(*args, **kwargs):
        return nnx.dot_product_attention(*args, **kwargs)

    module = make_module(attention_fn=attention_fn)
    with pytest.raises(ValueError, match=r"`module`.*attention_fn.*<function"):
        from_flax(module)


def test_subclass_that_computes_otherwise_is_refused():
    class Residual(nnx.MultiHeadAttention):
        def __call__(self, x):
            return x + super().__call__(x)

    module = Residual(HEADS, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"`module`.*subclass.*`__call__`.*Residual"):
        from_flax(module)


@pytest.mark.parametrize(
    "module",
    [lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda: None],
    ids=["Linear", "None"],
)
def test_module_of_another_kind(module):
    with pytest.raises(TypeError, match=r"`module`.*flax.nnx.MultiHeadAttention"):
        from_flax(module())


def test_missing_flax_is_named_with_its_install_line(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "flax" else find_spec(name, *rest),
    )
    message = r'from_flax needs flax.*pip install "keras-mha\[flax\]"'
    with pytest.raises(MissingExtra, match=message):
        from_flax(None)
