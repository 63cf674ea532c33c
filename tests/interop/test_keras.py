"""Keras's own attention layers beside ours: configuration, weights, state, numbers."""

import inspect

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from keras_mha.interop import from_keras
from tests.helpers import call_at_once, to_numpy, to_tensor

BACKEND = keras.backend.backend()
MHA = keras.layers.MultiHeadAttention
GQA = keras.layers.GroupQueryAttention

# Keras before 3.14 and 3.15 has no gate and no window.
KNOWN = {kind: set(inspect.signature(kind.__init__).parameters) for kind in (MHA, GQA)}

BATCH = 2

# Zeros take no random numbers, which JAX would compile for every shape.
ZEROS = {"kernel_initializer": "zeros"}

# JAX compiles two layers for every example.
EXAMPLES = settings.default.max_examples
few_on_jax = settings(max_examples=EXAMPLES // 3 if BACKEND == "jax" else EXAMPLES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_weights(layer, seed=1):
    """Gives a built layer random weights, biases too."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) / 2)
    return layer


def make_mha(widths=(6, 6, 6), axes=1, **options):
    """A built layer for query, value and key of these widths."""
    layer = MHA(**{"num_heads": 2, "key_dim": 3, **ZEROS, **options})
    shapes = [(None, *(None,) * axes, width) for width in widths]
    layer.build(*shapes)
    return with_weights(layer)


def make_gqa(widths=(6, 6, 6), **options):
    defaults = {"head_dim": 3, "num_query_heads": 4, "num_key_value_heads": 2}
    layer = GQA(**{**defaults, **ZEROS, **options})
    layer.build(*[(None, None, width) for width in widths])
    return with_weights(layer)


def projections(layer):
    names = ("query", "key", "value", "gate", "output")
    found = {name: getattr(layer, f"_{name}_dense", None) for name in names}
    return {name: dense for name, dense in found.items() if dense is not None}


def run(layer, inputs, **options):
    tensors = [to_tensor(x) for x in inputs]
    results = call_at_once(lambda *x: layer(*x, **options), tensors)
    results = results if isinstance(results, tuple) else (results,)
    return [to_numpy(x) for x in results]


def assert_same(old, new, inputs, atol=1e-5, **options):
    found, expected = run(new, inputs, **options), run(old, inputs, **options)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def assert_same_projections(old, new):
    """Each projection alone: Keras's layer of 3.7 goes around what int8 computes."""
    for name, dense in projections(old).items():
        x = normal(BATCH, 3, *dense.kernel.shape[: 2 if name == "output" else 1])
        assert_same(dense, projections(new)[name], [x])


# ------------------------------------------------------------------ numbers


def only_known(kind, options):
    return {name: x for name, x in options.items() if name in KNOWN[kind]}


@st.composite
def calls(draw):
    """How a layer is called: lengths, masks, whether scores are asked for."""
    queries = draw(st.integers(1, 4))
    keys = draw(st.integers(queries, 5))
    options = {"return_attention_scores": draw(st.booleans())}
    if draw(st.booleans()):
        # Every query sees at least the key of its own place, with all other masks too.
        seen = np.random.default_rng(0).random((BATCH, queries, keys)) < 0.5
        options["attention_mask"] = seen | np.eye(queries, keys, dtype="bool")
    if draw(st.booleans()):
        options["use_causal_mask"] = True
    return queries, keys, options


# Where there are as many heads of width 1 as tokens, Keras's layers on TensorFlow add
# the heads' biases to the tokens: `ops.add` takes the second axis for channels.
WIDTHS_OF_HEADS = st.integers(2 if BACKEND == "tensorflow" else 1, 3)

shared_options = {
    "dropout": st.sampled_from([0.0, 0.4]),
    "use_bias": st.booleans(),
    "use_gate": st.booleans(),
    "sliding_window": st.sampled_from([None, 1, 2]),
}


@few_on_jax
@given(
    calls(),
    st.fixed_dictionaries(
        {
            **shared_options,
            "num_heads": st.integers(1, 3),
            "key_dim": WIDTHS_OF_HEADS,
            "value_dim": st.sampled_from([None, 2]),
            "output_shape": st.sampled_from([None, 5, (2, 3)]),
        }
    ),
    st.tuples(*[st.integers(1, 4)] * 3),
)
def test_multi_head_attention(call, options, widths):
    queries, keys, call_options = call
    options = only_known(MHA, options)
    if BACKEND == "jax":  # Keras's layer does not run on it with another value width
        options["value_dim"] = None
    old = make_mha(widths, **options)
    inputs = [
        normal(BATCH, length, width)
        for length, width in zip((queries, keys, keys), widths, strict=True)
    ]
    assert_same(old, from_keras(old), inputs, **call_options)


@few_on_jax
@given(
    calls(),
    st.fixed_dictionaries(
        {
            **shared_options,
            "head_dim": WIDTHS_OF_HEADS,
            "num_query_heads": st.sampled_from([4]),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
        }
    ),
    st.tuples(*[st.integers(1, 4)] * 3),
)
def test_group_query_attention(call, options, widths):
    queries, keys, call_options = call
    old = make_gqa(widths, **only_known(GQA, options))
    inputs = [
        normal(BATCH, length, width)
        for length, width in zip((queries, keys, keys), widths, strict=True)
    ]
    mask = call_options.get("attention_mask")
    if mask is not None:  # Keras's layer wants an axis of heads
        old_options = {**call_options, "attention_mask": mask[:, None]}
    else:
        old_options = call_options
    found = run(from_keras(old), inputs, **call_options)
    for ours, theirs in zip(found, run(old, inputs, **old_options), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("attention_axes", [None, 2, (1, 2)], ids=str)
def test_attention_axes(attention_axes):
    old = make_mha(axes=2, attention_axes=attention_axes)
    new = from_keras(old)
    assert_same(old, new, [normal(BATCH, 2, 3, 6)] * 2)


@pytest.mark.parametrize("make", [make_mha, make_gqa])
def test_padding_that_inputs_carry(make):
    tokens = to_tensor([[1, 2, 3, 0], [4, 0, 0, 0]])
    embedding = keras.layers.Embedding(5, 6, mask_zero=True)
    embedding.build()
    old = make()
    found, expected = (
        to_numpy(call_at_once(lambda x, y=y: y(embedding(x), embedding(x)), [tokens]))
        for y in (from_keras(old), old)
    )
    valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], "bool")
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5)


def test_value_width_of_its_own():
    old = make_mha(value_dim=5)
    new = from_keras(old)
    assert new.value_dim == 5
    for weight, other in zip(new.get_weights(), old.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


# ------------------------------------------------------------------ configuration

SETTINGS = {
    "name": "attention",
    "dropout": 0.25,
    "use_bias": False,
    "seed": 3,
    "trainable": False,
    "kernel_initializer": keras.initializers.Orthogonal(2.0),
    "bias_initializer": keras.initializers.Constant(0.5),
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "bias_regularizer": keras.regularizers.L1(0.2),
    "activity_regularizer": keras.regularizers.L2(0.3),
    "kernel_constraint": keras.constraints.MaxNorm(1.5),
    "bias_constraint": keras.constraints.NonNeg(),
    "dtype": "mixed_bfloat16",
    "use_gate": True,
    "sliding_window": 4,
}


@pytest.mark.parametrize("make", [make_mha, make_gqa])
@pytest.mark.parametrize("is_built", [False, True])
def test_settings_are_retained(make, is_built):
    kind = MHA if make is make_mha else GQA
    settings = {
        name: x
        for name, x in SETTINGS.items()
        if name in KNOWN[kind] | {"name", "trainable", "dtype"}
    }
    sizes = {"num_heads": 4, "key_dim": 3}
    if kind is GQA:
        sizes = {"num_query_heads": 4, "head_dim": 3, "num_key_value_heads": 2}
    old = kind(**sizes, **settings)
    if is_built:
        old.build((None, None, 6), (None, None, 6))
    new = from_keras(old)
    config, expected = new.get_config(), old.get_config()
    for name in settings:
        assert config[name] == expected[name], name
    assert (new.num_heads, new.key_dim) == (4, 3)
    assert new.num_key_value_heads == (2 if kind is GQA else 4)
    assert new.built == is_built


def test_layer_without_weights_gives_one_without():
    old = MHA(2, 3, output_shape=(2, 5), attention_axes=(1, 2), name="fresh")
    new = from_keras(old)
    assert not new.built
    assert not new.weights
    assert new(keras.Input((3, 4, 6))).shape == (None, 3, 4, 2, 5)


def test_losses_and_constraints_are_the_sublayers():
    old = make_mha(
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer=keras.regularizers.L1(0.2),
        kernel_constraint=keras.constraints.NonNeg(),
    )
    new = from_keras(old)
    found, expected = map(to_numpy, map(keras.ops.stack, (new.losses, old.losses)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for dense in projections(new).values():
        assert isinstance(dense.kernel.constraint, keras.constraints.NonNeg)


def test_flash_attention_is_left_to_the_new_layer():
    old = make_mha(flash_attention=False)
    assert "flash_attention" not in from_keras(old).get_config()


# ------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("make", [make_mha, make_gqa])
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_half_precision(make, dtype):
    old = make(dtype=dtype)
    new = from_keras(old)
    assert new.dtype_policy == old.dtype_policy
    for weight, other in zip(new.weights, old.weights, strict=True):
        assert weight.dtype == other.dtype
        np.testing.assert_array_equal(to_numpy(weight), to_numpy(other))


def policies(key):
    found = keras.dtype_policies.DTypePolicyMap(
        default_policy=keras.dtype_policies.DTypePolicy("float32")
    )
    found[key] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    return found


@pytest.mark.parametrize("path", ["attention/query", "outer/attention/query"])
def test_policy_of_one_projection(path):
    old = MHA(2, 3, name="attention", dtype=policies(path))

    class Outer(keras.Model):
        def __init__(self):
            super().__init__(name="outer")
            self.attention = old

        def call(self, x):
            return self.attention(x, x)

    if path.startswith("outer"):
        Outer()(to_tensor(normal(BATCH, 3, 6)))
    else:
        old.build((None, None, 6), (None, None, 6))
    new = from_keras(old)
    dtypes = {name: dense.compute_dtype for name, dense in projections(new).items()}
    assert dtypes == {
        "query": "bfloat16",
        "key": "float32",
        "value": "float32",
        "output": "float32",
    }
    assert new.compute_dtype == "float32"


# ------------------------------------------------------------------ trainable


@pytest.mark.parametrize("make", [make_mha, make_gqa])
def test_frozen_layer(make):
    old = make()
    old.trainable = False
    new = from_keras(old)
    assert not new.trainable
    assert not new.trainable_weights
    assert len(new.non_trainable_weights) == 8


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_frozen_sublayer(name):
    old = make_mha()
    projections(old)[name].trainable = False
    new = from_keras(old)
    trainable = {name: x.trainable for name, x in projections(new).items()}
    assert trainable == {x: x != name for x in ("query", "key", "value", "output")}
    assert len(new.trainable_weights) == 6


def test_frozen_variable():
    old = make_mha()
    old._value_dense.bias.trainable = False
    new = from_keras(old)
    assert [x.trainable for x in new.value_dense.weights] == [True, False]
    assert len(new.trainable_weights) == 7


def test_frozen_layer_can_be_thawed_again():
    old = make_mha()
    old.trainable = False
    new = from_keras(old)
    new.trainable = True
    assert len(new.trainable_weights) == 8


# ------------------------------------------------------------------ LoRA and int8


@pytest.mark.parametrize("make", [make_mha, make_gqa])
def test_lora(make):
    old = make()
    old._query_dense.enable_lora(2)
    old._output_dense.enable_lora(1)
    with_weights(old, seed=2)
    new = from_keras(old)
    enabled = {name: dense.lora_enabled for name, dense in projections(new).items()}
    assert enabled == {"query": True, "key": False, "value": False, "output": True}
    assert [x.trainable for x in new.query_dense.weights] == [
        x.trainable for x in old._query_dense.weights
    ]
    assert_same(old, new, [normal(BATCH, 3, 6)] * 2)


def test_lora_goes_on_as_before():
    old = make_mha()
    old._key_dense.enable_lora(2)
    with_weights(old, seed=2)
    new = from_keras(old)
    assert new.key_dense.lora_rank == 2
    for dense in (old._key_dense, new.key_dense):
        dense.lora_kernel_a.assign(keras.ops.ones(dense.lora_kernel_a.shape))
    np.testing.assert_allclose(
        to_numpy(keras.ops.convert_to_tensor(new.key_dense.kernel)),
        to_numpy(keras.ops.convert_to_tensor(old._key_dense.kernel)),
        atol=1e-6,
    )


def test_loras_strength_is_retained():
    old = make_mha()
    if "lora_alpha" not in inspect.signature(old._key_dense.enable_lora).parameters:
        pytest.skip("this Keras has no lora_alpha")
    old._key_dense.enable_lora(2, lora_alpha=8)
    with_weights(old, seed=2)
    new = from_keras(old)
    assert new.key_dense.lora_alpha == 8
    assert_same(old, new, [normal(BATCH, 3, 6)] * 2)


def test_int8():
    old = make_mha()
    old._query_dense.quantize("int8")
    old._output_dense.quantize("int8")
    new = from_keras(old)
    modes = {name: dense.quantization_mode for name, dense in projections(new).items()}
    assert modes == {"query": "int8", "key": None, "value": None, "output": "int8"}
    for weight, other in zip(new.weights, old.weights, strict=True):
        assert weight.dtype == other.dtype
        np.testing.assert_array_equal(to_numpy(weight), to_numpy(other))
    assert_same_projections(old, new)


def test_int8_of_a_model_that_holds_the_layer():
    inputs = keras.Input((3, 6))
    old = MHA(2, 3)
    model = keras.Model(inputs, old(inputs, inputs))
    model.quantize("int8")
    assert old._query_dense.quantization_mode == "int8"
    assert_same_projections(old, from_keras(old))


def test_int8_with_lora():
    old = make_mha()
    old._query_dense.quantize("int8")
    old._query_dense.enable_lora(2)
    with_weights(old, seed=2)
    assert_same_projections(old, from_keras(old))


def test_int8_under_mixed_precision():
    old = make_mha(dtype="mixed_bfloat16")
    old._value_dense.quantize("int8")
    new = from_keras(old)
    assert new.compute_dtype == new.value_dense.compute_dtype == "bfloat16"
    assert new.value_dense.quantization_mode == "int8"
    assert new.query_dense.quantization_mode is None


# ------------------------------------------------------------------ surroundings


def test_dropout_goes_on_where_it_was():
    old = make_mha(dropout=0.5, seed=1)
    x = to_tensor(normal(BATCH, 3, 6))
    old(x, x, training=True)
    old(x, x, training=True)
    new = from_keras(old)
    state = to_numpy(old._dropout_layer.seed_generator.state)
    found = to_numpy(new._dropout_layer.seed_generator.state)
    np.testing.assert_array_equal(found, state)
    fresh = make_mha(dropout=0.5, seed=1)._dropout_layer.seed_generator.state
    assert (to_numpy(fresh) != state).any()


@pytest.mark.parametrize("make", [make_mha, make_gqa])
def test_old_layer_stays_as_it_was(make):
    old = make(dropout=0.5)
    old._key_dense.trainable = False
    config, weights = old.get_config(), old.get_weights()
    new = from_keras(old)
    new.set_weights([np.zeros_like(x) for x in new.get_weights()])
    new.trainable = True
    assert old.get_config() == config
    assert not old._key_dense.trainable
    for weight, copy in zip(old.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, copy)


def test_layer_built_by_a_call():
    old = MHA(2, 3)
    inputs = [normal(BATCH, 3, 6), normal(BATCH, 4, 5)]
    old(*map(to_tensor, inputs))
    assert_same(old, from_keras(old), inputs)


def test_layer_of_a_loaded_model(tmp_path):
    inputs = keras.Input((3, 6))
    model = keras.Model(inputs, make_gqa(name="attention")(inputs, inputs))
    model.save(tmp_path / "model.keras")
    old = keras.saving.load_model(tmp_path / "model.keras").get_layer("attention")
    assert_same(old, from_keras(old), [normal(BATCH, 3, 6)] * 2)


def test_new_layer_is_saved_and_loaded(tmp_path):
    old = make_gqa()
    inputs = keras.Input((3, 6))
    model = keras.Model(inputs, from_keras(old)(inputs, inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = to_tensor(normal(BATCH, 3, 6))
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(old(x, x)), atol=1e-5)


# ------------------------------------------------------------------ wrong use


class OfOurOwn(MHA):
    """A subclass may compute anything with its parent's weights."""


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (lambda: OfOurOwn(2, 3), "OfOurOwn"),
        (lambda: keras_mha.MultiHeadAttention(2, 3), "MultiHeadAttention"),
        (lambda: keras.layers.Attention(), "Attention"),
        (lambda: MHA, "type"),
        (lambda: None, "NoneType"),
    ],
    ids=["subclass", "ours", "Attention", "class", "None"],
)
def test_layer_of_another_kind(layer, received):
    message = rf"`layer`.*MultiHeadAttention.*GroupQueryAttention.*type {received}\)"
    with pytest.raises(TypeError, match=message):
        from_keras(layer())


def test_int4_is_refused_by_name():
    old = make_mha()
    try:
        old._query_dense.quantize("int4")
    except (ValueError, NotImplementedError):
        pytest.skip("this Keras has no int4")
    with pytest.raises(ValueError, match=r"`layer`.*int8 or float8.*'query'.*int4"):
        from_keras(old)
