"""Bare kernels and biases become a layer's, whatever their layout and framework."""

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from keras_mha.interop import set_projections
from tests import oracle
from tests.helpers import to_numpy, to_tensor

NAMES = ("query", "key", "value", "output")
INPUTS = NAMES[:3]
LAYOUTS = ("keras", "dense", "torch")

# Every width is another one, so that no axis can be taken for another.
WIDTHS = {"query": 5, "key": 6, "value": 7}
OPTIONS = {"num_heads": 4, "key_dim": 3, "value_dim": 2, "num_key_value_heads": 2}


def make(**options):
    return keras_mha.MultiHeadAttention(**{**OPTIONS, **options})


def build(layer, widths=WIDTHS):
    layer.build(*((None, None, widths[name]) for name in ("query", "value", "key")))
    return layer


def kernel_shapes(layer, widths=WIDTHS):
    heads, groups = layer.num_heads, layer.num_key_value_heads
    outputs = layer.get_config()["output_shape"] or (widths["query"],)
    return {
        "query": (widths["query"], heads, layer.key_dim),
        "key": (widths["key"], groups, layer.key_dim),
        "value": (widths["value"], groups, layer.value_dim),
        "output": (heads, layer.value_dim, *outputs),
    }


def random_projections(layer, widths=WIDTHS, seed=0):
    """A kernel and a bias for each projection, as Keras has them, in float32."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in kernel_shapes(layer, widths).items():
        bias_shape = shape[2:] if name == "output" else shape[1:]
        arrays = rng.normal(size=shape), rng.normal(size=bias_shape)
        found[name] = tuple(array.astype("float32") for array in arrays)
    return found


def in_layout(name, kernel, layout):
    """A kernel of Keras's shape as the layout has it."""
    if layout == "keras":
        return kernel
    if name == "output":
        flat = kernel.reshape(-1, *kernel.shape[2:])
        return flat if layout == "dense" else flat.reshape(flat.shape[0], -1).T
    flat = kernel.reshape(kernel.shape[0], -1)
    return flat if layout == "dense" else flat.T


def fused_in_layout(kernels, layout):
    axis = 0 if layout == "torch" else 1
    kernels = [in_layout(name, kernels[name], layout) for name in INPUTS]
    return np.concatenate(kernels, axis)


def kernel_of(layer, name):
    return to_numpy(getattr(layer, f"{name}_dense").kernel)


def bias_of(layer, name):
    return to_numpy(getattr(layer, f"{name}_dense").bias)


def assert_has(layer, projections):
    """The layer's kernels and biases are these, to the last bit."""
    for name, (kernel, bias) in projections.items():
        np.testing.assert_array_equal(kernel_of(layer, name), kernel, err_msg=name)
        if bias is not None:
            np.testing.assert_array_equal(bias_of(layer, name), bias, err_msg=name)


# ------------------------------------------------------------------ layouts


@st.composite
def cases(draw):
    groups = draw(st.integers(1, 3))
    options = {
        "num_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "key_dim": draw(st.integers(1, 4)),
        "value_dim": draw(st.integers(1, 4)),
        "output_shape": draw(st.sampled_from([None, 5, (2, 3)])),
    }
    fused = draw(st.booleans())
    widths = [draw(st.integers(1, 6)) for _ in INPUTS]
    widths = dict(zip(INPUTS, [widths[0]] * 3 if fused else widths, strict=True))
    if fused:
        options["value_dim"] = options["key_dim"]
    return {
        "options": options,
        "widths": widths,
        "fused": fused,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "is_built": draw(st.booleans()),
        "is_flat": draw(st.booleans()),
    }


@given(cases())
def test_every_layout_gives_the_weights_it_holds(case):
    # Zeros take no random numbers, which JAX would compile for every shape.
    layer = make(kernel_initializer="zeros", **case["options"])
    projections = random_projections(layer, case["widths"])
    layout, is_flat = case["layout"], case["is_flat"]

    def bias_as_given(bias):
        return bias.reshape(-1) if is_flat else bias

    given = {
        name: (in_layout(name, kernel, layout), bias_as_given(bias))
        for name, (kernel, bias) in projections.items()
    }
    if case["fused"]:
        kernels = {name: projections[name][0] for name in INPUTS}
        biases = [projections[name][1] for name in INPUTS]
        if layout == "keras":
            bias = bias_as_given(np.concatenate(biases))
        else:
            bias = np.concatenate([x.reshape(-1) for x in biases])
        given = {
            "qkv": (fused_in_layout(kernels, layout), bias),
            "output": given["output"],
        }
    if case["is_built"]:
        build(layer, case["widths"])
    set_projections(layer, **given, layout=layout)
    assert_has(layer, projections)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_computes_what_the_projections_say(layout):
    layer = make(output_shape=(2, 4))
    projections = random_projections(layer)
    given = {
        name: (in_layout(name, kernel, layout), bias)
        for name, (kernel, bias) in projections.items()
    }
    set_projections(layer, **given, layout=layout)
    rng = np.random.default_rng(1)
    query, value, key = (
        rng.normal(size=(2, length, WIDTHS[name])).astype("float32")
        for name, length in (("query", 3), ("value", 4), ("key", 4))
    )
    weights = {f"{name}_kernel": pair[0] for name, pair in projections.items()}
    weights |= {f"{name}_bias": pair[1] for name, pair in projections.items()}
    expected, _ = oracle.multi_head_attention(weights, OPTIONS, query, value, key)
    output = layer(*map(to_tensor, (query, value, key)))
    np.testing.assert_allclose(to_numpy(output), expected, atol=1e-5)


def test_torch_kernels_rows_are_heads_in_order():
    layer = make(num_heads=2, key_dim=3, value_dim=3, num_key_value_heads=None)
    kernel = np.arange(24.0).reshape(6, 4)  # row n H + h
    set_projections(layer, kernel, kernel, kernel, layout="torch")
    assert kernel_of(layer, "query")[1, 0].tolist() == [1, 5, 9]
    assert kernel_of(layer, "query")[1, 1].tolist() == [13, 17, 21]


def test_dense_kernels_columns_are_heads_in_order():
    layer = make(num_heads=2, key_dim=3, value_dim=3, num_key_value_heads=None)
    kernel = np.arange(24.0).reshape(4, 6)  # column n H + h
    set_projections(layer, kernel, kernel, kernel, layout="dense")
    assert kernel_of(layer, "value")[1].tolist() == [[6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("layout", ["dense", "torch"])
def test_fused_kernel_of_grouped_heads_with_values_of_another_width(layout):
    layer = make()
    widths = dict.fromkeys(INPUTS, 5)
    projections = random_projections(layer, widths)
    kernels = {name: projections[name][0] for name in INPUTS}
    bias = np.concatenate([projections[name][1].reshape(-1) for name in INPUTS])
    set_projections(layer, qkv=(fused_in_layout(kernels, layout), bias), layout=layout)
    assert_has(layer, {name: projections[name] for name in INPUTS})


# ------------------------------------------------------------------ kernels and biases


def test_list_of_weights_is_a_pair():
    source, layer = build(make(bias_initializer="normal")), make()
    weights = {x: getattr(source, f"{x}_dense").get_weights() for x in NAMES}
    set_projections(layer, **weights)
    assert_has(layer, weights)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: (x, None)])
def test_bias_becomes_zero_where_none_is_given(wrap):
    layer = make(bias_initializer="ones")
    projections = random_projections(layer)
    set_projections(layer, **{name: wrap(x[0]) for name, x in projections.items()})
    assert_has(
        layer, {name: (x[0], np.zeros_like(x[1])) for name, x in projections.items()}
    )


def test_fused_kernel_without_a_bias_makes_biases_zero():
    layer = make(value_dim=3, bias_initializer="ones")
    set_projections(layer, qkv=np.ones((5, 8, 3)))
    assert all((bias_of(layer, name) == 0).all() for name in INPUTS)
    assert (bias_of(layer, "output") == 1).all()


def test_layer_without_biases_takes_kernels():
    layer = make(use_bias=False)
    projections = random_projections(layer)
    set_projections(layer, **{name: x[0] for name, x in projections.items()})
    assert_has(layer, {name: (x[0], None) for name, x in projections.items()})


# ------------------------------------------------------------------ arrays


def keras_variable(dtype):
    return lambda x: keras.Variable(to_tensor(x, dtype), dtype=dtype)


def torch_parameter(x):
    import torch

    return torch.nn.Parameter(torch.tensor(x))


def torch_tensor(dtype):
    def convert(x):
        import torch

        return torch.tensor(x).to(getattr(torch, dtype))

    return convert


def torch_view(x):
    import torch

    return torch.tensor(x.T.copy(), requires_grad=True).permute(
        *range(x.ndim - 1, -1, -1)
    )


def jax_array(dtype):
    def convert(x):
        import jax.numpy as jnp

        return jnp.asarray(x, dtype)

    return convert


def tensorflow_tensor(dtype):
    def convert(x):
        import tensorflow as tf

        return tf.constant(x, dtype)

    return convert


def tensorflow_variable(dtype):
    def convert(x):
        import tensorflow as tf

        return tf.Variable(x, dtype=dtype)

    return convert


ARRAYS = {
    "NumPy float64": lambda x: x.astype("float64"),
    "NumPy float16": lambda x: x.astype("float16"),
    "NumPy bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "NumPy, read-only": lambda x: np.broadcast_to(x, x.shape),
    "NumPy, Fortran's order": np.asfortranarray,
    "Keras tensor": to_tensor,
    "Keras tensor, bfloat16": lambda x: to_tensor(x, "bfloat16"),
    "Keras variable": keras_variable("float32"),
    "Keras variable, float16": keras_variable("float16"),
    "Keras variable, bfloat16": keras_variable("bfloat16"),
    "torch parameter": torch_parameter,
    "torch view with a gradient": torch_view,
    "torch float64": torch_tensor("float64"),
    "torch float16": torch_tensor("float16"),
    "torch bfloat16": torch_tensor("bfloat16"),
    "JAX": jax_array("float32"),
    "JAX float16": jax_array("float16"),
    "JAX bfloat16": jax_array("bfloat16"),
    "TensorFlow": tensorflow_tensor("float32"),
    "TensorFlow bfloat16": tensorflow_tensor("bfloat16"),
    "TensorFlow variable": tensorflow_variable("float32"),
    "TensorFlow variable, bfloat16": tensorflow_variable("bfloat16"),
}


@pytest.mark.parametrize("convert", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_any_framework(convert):
    layer = build(make())
    # Numbers that every dtype holds exactly.
    kernel = np.arange(60.0, dtype="float32").reshape(5, 4, 3)
    bias = np.arange(12.0, dtype="float32").reshape(4, 3) / 2
    set_projections(layer, query=(convert(kernel), convert(bias)))
    assert_has(layer, {"query": (kernel, bias)})


def test_arrays_given_stay_as_they_are():
    layer = make()
    projections = random_projections(layer)
    copies = {name: [x.copy() for x in pair] for name, pair in projections.items()}
    set_projections(layer, **projections)
    layer.set_weights([np.zeros_like(x) for x in layer.get_weights()])
    for name, pair in projections.items():
        for array, copy in zip(pair, copies[name], strict=True):
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed_bfloat16"])
def test_weights_keep_the_layers_dtype(dtype):
    layer = build(make(dtype=dtype))
    kernel = np.arange(60.0, dtype="float32").reshape(5, 4, 3)
    set_projections(layer, query=kernel)
    variable = layer.query_dense.kernel
    assert keras.backend.standardize_dtype(variable.dtype) == layer.variable_dtype
    assert_has(layer, {"query": (kernel, None)})


# ------------------------------------------------------------------ built and unbuilt


@pytest.mark.parametrize("name", NAMES)
def test_projections_left_out_stay_as_they_are(name):
    layer = build(make())
    before = {x: (kernel_of(layer, x), bias_of(layer, x)) for x in NAMES}
    new = random_projections(layer)[name]
    set_projections(layer, **{name: new})
    assert_has(layer, {**before, name: new})


def test_unbuilt_layer_is_built_from_the_shapes():
    layer = make()
    projections = random_projections(layer)
    set_projections(layer, **projections)
    assert layer.built
    inputs = (keras.Input((3, 5)), keras.Input((4, 7)), keras.Input((4, 6)))
    assert layer(*inputs).shape == (None, 3, 5)


def test_unbuilt_layer_needs_no_output():
    layer = make(bias_initializer="ones")
    projections = random_projections(layer)
    projections.pop("output")
    set_projections(layer, **projections)
    assert_has(layer, projections)
    assert tuple(layer.output_dense.kernel.shape) == (4, 2, 5)


def test_several_attention_axes_of_a_built_layer():
    layer = make(attention_axes=(1, 2))
    shapes = [(None, None, None, WIDTHS[x]) for x in ("query", "value", "key")]
    layer.build(*shapes)
    projections = random_projections(layer)
    set_projections(layer, **projections)
    assert_has(layer, projections)


def test_one_attention_axis_of_several_of_a_built_layer():
    layer = make(attention_axes=2)
    layer.build(*[(None, 2, 3, WIDTHS[x]) for x in ("query", "value", "key")])
    projections = random_projections(layer)
    set_projections(layer, **projections)
    assert_has(layer, projections)


def test_other_weights_stay_as_they_are():
    layer = build(
        make(
            use_gate=True,
            qk_norm="rms",
            attention_sink="learned",
            position=keras_mha.RelativePositionBias(),
        )
    )
    layer.set_weights([np.full_like(x, 0.5) for x in layer.get_weights()])
    projections = random_projections(layer)
    set_projections(layer, **projections)
    assert_has(layer, projections)
    others = [layer.sink, layer.query_norm_scale, layer.position.table]
    others += layer._gate_dense.weights
    assert all((to_numpy(weight) == 0.5).all() for weight in others)


def test_layer_in_a_model_changes_what_the_model_predicts():
    inputs = keras.Input((3, 4))
    layer = keras_mha.MultiHeadAttention(2, 2)
    model = keras.Model(inputs, layer(inputs))
    set_projections(layer, output=(np.zeros((2, 2, 4)), np.arange(4.0)))
    output = to_numpy(model(to_tensor(np.ones((1, 3, 4)))))
    np.testing.assert_array_equal(output, [[[0, 1, 2, 3]] * 3])


# ------------------------------------------------------------------ one head's kernel


def one_head(seed=0, width=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(width, width)).astype("float32")


def make_square(**options):
    """Heads that split 12 features into 3 times 4."""
    return keras_mha.MultiHeadAttention(num_heads=3, key_dim=4, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_built", [False, True])
def test_kernel_of_one_head_is_shared_by_all(layout, is_built):
    layer, kernel = make_square(), one_head()
    if is_built:
        layer.build((None, None, 12))
    given = kernel.T if layout == "torch" else kernel
    set_projections(layer, given, given, given, layout=layout)
    expected = np.zeros((12, 3, 4), "float32")
    for head in range(3):
        expected[4 * head : 4 * head + 4, head] = kernel
    assert_has(layer, dict.fromkeys(INPUTS, (expected, np.zeros((3, 4)))))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (12,)])
def test_bias_beside_the_kernel_of_one_head(shape):
    layer, kernel = make_square(), one_head()
    bias = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    set_projections(layer, (kernel, bias), (kernel, bias), (kernel, bias))
    expected = np.tile(bias, (3, 1)) if shape == (4,) else bias.reshape(3, 4)
    np.testing.assert_array_equal(bias_of(layer, "key"), expected)


def test_one_projection_may_be_shared_and_another_not():
    layer = make_square()
    full = np.random.default_rng(1).normal(size=(12, 12)).astype("float32")
    set_projections(layer, one_head(), full, full, layout="dense")
    assert (kernel_of(layer, "query")[:4, 1] == 0).all()
    np.testing.assert_array_equal(kernel_of(layer, "key").reshape(12, 12), full)


def test_kernel_of_one_head_that_is_not_square_where_the_width_is_known():
    layer = keras_mha.MultiHeadAttention(num_heads=3, key_dim=4)
    layer.build((None, None, 6))
    kernel = np.arange(8.0).reshape(2, 4)
    set_projections(layer, key=kernel)
    assert kernel_of(layer, "key")[2:4, 1].tolist() == kernel.tolist()


def test_kernel_of_one_head_of_grouped_keys():
    layer = keras_mha.MultiHeadAttention(4, 3, num_key_value_heads=2)
    layer.build((None, None, 6))
    kernel = np.arange(9.0).reshape(3, 3)
    set_projections(layer, value=kernel)
    assert kernel_of(layer, "value")[3:, 1].tolist() == kernel.tolist()
    assert (kernel_of(layer, "value")[3:, 0] == 0).all()


# ------------------------------------------------------------------ wrong use

FULL = {
    name: np.ones(shape, "float32") for name, shape in kernel_shapes(make()).items()
}


def ones(*shape):
    return np.ones(shape, "float32")


# Each line: a name, what is given, the layout, the error, and what its message must
# say, in order. All are wrong for a built layer and for one that is not.
WRONG = [
    ("heads", {"query": ones(5, 3, 3)}, "keras", ValueError,
     r"`query`'s kernel.*\(., 4, 3\).*'keras'.*\(5, 3, 3\)"),
    ("ungrouped key", {"key": ones(6, 4, 3)}, "keras", ValueError,
     r"`key`'s kernel.*\(., 2, 3\).*\(6, 4, 3\)"),
    ("value's width", {"value": ones(7, 2, 3)}, "keras", ValueError,
     r"`value`'s kernel.*\(., 2, 2\).*\(7, 2, 3\)"),
    ("output turned", {"output": ones(5, 4, 2)}, "keras", ValueError,
     r"`output`'s kernel.*\(4, 2, 5\).*'keras'.*\(5, 4, 2\)"),
    ("output too wide", {"output": ones(4, 2, 6)}, "keras", ValueError,
     r"`output`'s kernel.*\(4, 2, 5\).*\(4, 2, 6\)"),
    ("axes of another layout", {"query": ones(5, 12)}, "keras", ValueError,
     r"`query`'s kernel.*\(., 4, 3\).*'keras'.*\(5, 12\)"),
    ("dense, turned", {"query": ones(12, 5)}, "dense", ValueError,
     r"`query`'s kernel.*\(., 12\).*'dense'.*\(12, 5\)"),
    ("torch, turned", {"value": ones(7, 4)}, "torch", ValueError,
     r"`value`'s kernel.*\(4, .\).*'torch'.*\(7, 4\)"),
    ("torch's output", {"output": ones(8, 5)}, "torch", ValueError,
     r"`output`'s kernel.*\(5, 8\).*'torch'.*\(8, 5\)"),
    ("a vector", {"query": ones(12)}, "dense", ValueError,
     r"`query`'s kernel.*\(., 12\).*\(12,\)"),
    ("a number", {"query": np.float32(1)}, "keras", ValueError,
     r"`query`'s kernel.*\(., 4, 3\).*\(\)"),
    ("one head, no share", {"query": ones(2, 3)}, "keras", ValueError,
     r"`query`'s kernel.*\(., 4, 3\).*\(2, 3\)"),
    ("bias's width", {"query": (FULL["query"], ones(5))}, "keras", ValueError,
     r"`query`'s bias.*\(4, 3\).*\(5,\)"),
    ("bias turned", {"query": (FULL["query"], ones(3, 4))}, "keras", ValueError,
     r"`query`'s bias.*\(4, 3\).*\(3, 4\)"),
    ("bias of one head", {"query": (FULL["query"], ones(3))}, "keras", ValueError,
     r"`query`'s bias.*\(4, 3\).*\(3,\)"),
    ("output's bias", {"output": (FULL["output"], ones(8))}, "keras", ValueError,
     r"`output`'s bias.*\(5,\).*\(8,\)"),
    ("two kernels", {"query": (FULL["query"], FULL["query"])}, "keras", ValueError,
     r"`query`'s bias.*\(4, 3\).*\(5, 4, 3\)"),
    ("nested numbers", {"query": FULL["query"].tolist()}, "keras", TypeError,
     "`query`.*kernel or a pair.*list of 5 list"),
    ("three arrays", {"query": [FULL["query"], ones(12), ones(12)]}, "keras", TypeError,
     "`query`.*pair.*list of 3 ndarray"),
    ("nothing in it", {"query": ()}, "keras", TypeError, "`query`.*tuple of 0"),
    ("text", {"query": "glorot"}, "keras", TypeError, "query's kernel.*'glorot'.*str"),
    ("no kernel", {"query": (None, ones(12))}, "keras", TypeError,
     "query's kernel.*None.*NoneType"),
    ("bias False", {"query": (FULL["query"], False)}, "keras", TypeError,
     "query's bias.*array.*False.*bool"),
    ("integers", {"output": np.ones((4, 2, 5), "int64")}, "keras", TypeError,
     "output's kernel.*floating.*int64"),
    ("complex", {"key": np.ones((6, 2, 3), "complex64")}, "keras", TypeError,
     "key's kernel.*floating.*complex64"),
    ("bias of booleans", {"key": (FULL["key"], np.ones(6, "bool"))}, "keras", TypeError,
     "key's bias.*floating.*bool"),
    ("a placeholder", {"query": keras.KerasTensor((5, 4, 3))}, "keras", TypeError,
     "query's kernel.*array.*KerasTensor"),
    ("unknown layout", {}, "jax", ValueError,
     "`layout`.*'keras', 'dense', 'torch'.*'jax'"),
    ("layout None", {}, None, ValueError, "`layout`.*one of.*None"),
]  # fmt: skip

FUSED = [
    ("fused beside key", {"qkv": ones(5, 20), "key": FULL["key"]}, "dense", ValueError,
     "`qkv`.*`key`"),
    ("fused in keras's", {"qkv": ones(5, 8, 3)}, "keras", ValueError,
     "`qkv`.*'keras'.*key_dim=3.*value_dim=2"),
    ("fused ungrouped", {"qkv": ones(5, 36)}, "dense", ValueError,
     r"`qkv`'s kernel.*\(D, 22\).*'dense'.*\(5, 36\)"),
    ("fused turned", {"qkv": ones(5, 22)}, "torch", ValueError,
     r"`qkv`'s kernel.*\(22, D\).*'torch'.*\(5, 22\)"),
    ("fused bias", {"qkv": (ones(5, 22), ones(36))}, "dense", ValueError,
     r"`qkv`'s bias.*\(22,\).*\(36,\)"),
    ("fused bias of two axes", {"qkv": (ones(5, 22), ones(2, 11))}, "dense", ValueError,
     r"`qkv`'s bias.*\(22,\).*\(2, 11\)"),
    ("fused integers", {"qkv": np.ones((5, 22), "int32")}, "dense", TypeError,
     "qkv's kernel.*floating.*int32"),
]  # fmt: skip


def named(table):
    return [pytest.param(*line[1:], id=line[0]) for line in table]


@pytest.mark.parametrize(("given", "layout", "error", "message"), named(WRONG))
def test_wrong_projection_leaves_a_built_layer_as_it_was(given, layout, error, message):
    layer = build(make())
    before = layer.get_weights()
    # The others are right, and would be set before or after.
    others = {
        name: (in_layout(name, x, layout or "keras"), None) for name, x in FULL.items()
    }
    with pytest.raises(error, match=message):
        set_projections(layer, **{**others, **given}, layout=layout)
    for weight, copy in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, copy)


@pytest.mark.parametrize(("given", "layout", "error", "message"), named(WRONG))
def test_wrong_projection_leaves_a_layer_unbuilt(given, layout, error, message):
    layer = make()
    others = {
        name: (in_layout(name, x, layout or "keras"), None) for name, x in FULL.items()
    }
    with pytest.raises(error, match=message):
        set_projections(layer, **{**others, **given}, layout=layout)
    assert not layer.built
    assert not layer.weights


@pytest.mark.parametrize(("given", "layout", "error", "message"), named(FUSED))
def test_wrong_fused_projection(given, layout, error, message):
    layer = make()
    with pytest.raises(error, match=message):
        set_projections(layer, **given, layout=layout)
    assert not layer.built


def test_fused_bias_that_is_turned():
    layer = make(value_dim=3)
    with pytest.raises(ValueError, match=r"`qkv`'s bias.*\(8, 3\).*\(3, 8\)"):
        set_projections(layer, qkv=(ones(5, 8, 3), ones(3, 8)))


def test_fused_kernel_of_inputs_of_another_width():
    layer = build(make())
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"`value`'s kernel.*\(7, 4\).*\(5, 4\)"):
        set_projections(layer, qkv=ones(5, 22), layout="dense")
    for weight, copy in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, copy)


@pytest.mark.parametrize("name", INPUTS)
def test_width_of_the_inputs_is_known_once_the_layer_is_built(name):
    layer = build(make())
    shape = kernel_shapes(layer)[name]
    message = rf"`{name}`'s kernel.*\({shape[0]}, {shape[1]}, {shape[2]}\).*\(9, "
    with pytest.raises(ValueError, match=message):
        set_projections(layer, **{name: ones(9, *shape[1:])})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_that_might_be_of_one_head_is_refused_while_the_width_is_open(layout):
    # (2, 4) could be the share of 3 heads in 6 features, and as well a mistake.
    layer = make_square()
    kernel = ones(4, 2) if layout == "torch" else ones(2, 4)
    with pytest.raises(ValueError, match=r"`query`'s kernel"):
        set_projections(layer, kernel, kernel, kernel, layout=layout)
    assert not layer.built


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (2, 12), (12, 4)])
def test_kernel_of_no_heads_share_is_refused_by_a_built_layer(shape):
    layer = make_square()
    layer.build((None, None, 6))
    with pytest.raises(ValueError, match=r"`query`'s kernel.*\(6, 12\)"):
        set_projections(layer, query=ones(*shape), layout="dense")


def test_kernel_of_one_head_is_no_output():
    layer = make_square()
    layer.build((None, None, 12))
    with pytest.raises(ValueError, match=r"`output`'s kernel.*\(12, 12\).*\(4, 4\)"):
        set_projections(layer, output=one_head(), layout="dense")


def test_bias_of_a_layer_that_has_none():
    layer = make(use_bias=False)
    given = {**FULL, "output": (FULL["output"], ones(5))}
    with pytest.raises(ValueError, match=r"`output` has a bias.*use_bias=True.*\(5,\)"):
        set_projections(layer, **given)
    assert not layer.built


def test_fused_bias_of_a_layer_that_has_none():
    layer = make(use_bias=False)
    with pytest.raises(ValueError, match=r"`query` has a bias.*use_bias=True"):
        set_projections(layer, qkv=(ones(5, 22), ones(22)), layout="dense")


@pytest.mark.parametrize("name", INPUTS)
def test_unbuilt_layer_names_the_projections_it_misses(name):
    layer = make()
    given = {x: kernel for x, kernel in FULL.items() if x != name}
    with pytest.raises(ValueError, match=rf"`layer`.*no weights yet.*\['{name}'\]"):
        set_projections(layer, **given)
    assert not layer.built


def test_unbuilt_layer_cannot_know_its_attention_axes():
    layer = make(attention_axes=(1, 2))
    with pytest.raises(ValueError, match=r"`attention_axes`.*build it.*\(1, 2\)"):
        set_projections(layer, **FULL)
    assert not layer.built


def test_no_projection_at_all():
    with pytest.raises(ValueError, match=r"at least one of `query`.*`qkv`.*none"):
        set_projections(make())


@pytest.mark.parametrize(
    "layer", [keras.layers.Dense(2), None, keras_mha.MultiHeadAttention]
)
def test_layer_of_another_kind(layer):
    with pytest.raises(TypeError, match=r"`layer`.*keras_mha.MultiHeadAttention.*type"):
        set_projections(layer, **FULL)


@pytest.mark.parametrize("name", NAMES)
def test_layer_with_lora_is_refused(name):
    layer = build(make())
    getattr(layer, f"{name}_dense").enable_lora(1)
    before = layer.get_weights()
    with pytest.raises(ValueError, match=f"`layer`'s {name} projection has LoRA"):
        set_projections(layer, **FULL)
    for weight, copy in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, copy)


@pytest.mark.parametrize("name", NAMES)
def test_int8_layer_is_refused(name):
    layer = build(make())
    getattr(layer, f"{name}_dense").quantize("int8")
    with pytest.raises(ValueError, match=f"`layer`'s {name} projection is quantized"):
        set_projections(layer, **FULL)


def policy_map():
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy=keras.dtype_policies.DTypePolicy("float32")
    )
    policies[".*/key"] = keras.dtype_policies.get("int8_from_float32")
    return policies


@pytest.mark.parametrize(
    "dtype", ["int8_from_float32", policy_map()], ids=["for all", "for one"]
)
def test_layer_that_builds_to_int8_is_refused(dtype):
    layer = make(dtype=dtype)
    with pytest.raises(ValueError, match=r"`layer`'s dtype.*int8_from_float32"):
        set_projections(layer, **FULL)
    assert not layer.built
