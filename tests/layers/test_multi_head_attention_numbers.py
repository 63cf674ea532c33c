"""The numbers of `keras_mha.MultiHeadAttention`.

Against the float64 definition, for constructors and calls drawn at random; and against
`keras.layers.MultiHeadAttention` with the same weights, for the calls that it takes.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mha
from tests import oracle
from tests.helpers import (
    call_at_once,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
    with_variables,
)

BACKEND = keras.backend.backend()


# Every layer here is given numbers of its own, and drawing them is slow in JAX.
QUICK = {"kernel_initializer": "zeros"}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def variables_of(layer: Any) -> dict[str, Any]:
    """The layer's variables by the names that the definition gives them."""
    found = {}
    sublayers = {
        "query": layer.query_dense,
        "key": layer.key_dense,
        "value": layer.value_dense,
        "gate": getattr(layer, "_gate_dense", None),
        "output": layer.output_dense,
    }
    for name, sublayer in sublayers.items():
        if sublayer is not None:
            found[f"{name}_kernel"] = sublayer.kernel
            found[f"{name}_bias"] = sublayer.bias
    found["query_norm"] = getattr(layer, "query_norm_scale", None)
    found["key_norm"] = getattr(layer, "key_norm_scale", None)
    own = (
        "sink",
        "memory_key",
        "memory_value",
        "talking_heads_pre",
        "talking_heads_post",
    )
    for name in own:
        found[name] = getattr(layer, name, None)
    return {name: variable for name, variable in found.items() if variable is not None}


def randomize(layer: Any, seed: int = 0) -> None:
    """Gives every weight numbers of its own; as built, biases and sinks are zeros."""
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        value = rng.normal(size=tuple(variable.shape)) * 0.5
        variable.assign(value.astype("float32"))


def weights_of(layer: Any) -> dict[str, np.ndarray]:
    return {name: to_numpy(x.value) for name, x in variables_of(layer).items()}


def run(function: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    """The tensors that `function` returns for the arrays, as float64."""
    found = call_at_once(function, [to_tensor(array) for array in arrays])
    return [to_numpy(x) for x in (found if isinstance(found, tuple) else (found,))]


def assert_close(found, expected, what: str = "", tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance, err_msg=what
    )


# --------------------------------------------------- the definition, calls at random

QUERY_WIDTH, VALUE_WIDTH, KEY_WIDTH = 6, 5, 4

CONSTRUCTORS = {
    "heads": st.sampled_from([(1, None), (2, None), (4, 2), (4, 1), (3, 3)]),
    # Two features less their mean, over their deviation, are 1 and -1: a step, at which
    # float32 has no gradient to speak of. Hence heads that are wider than that.
    "key_dim": st.sampled_from([4, 5]),
    "value_dim": st.sampled_from([None, 3]),
    "use_bias": st.booleans(),
    "output_shape": st.sampled_from([None, 5, (2, 3)]),
    "sliding_window": st.sampled_from([None, 1, 3]),
    "use_gate": st.booleans(),
    "qk_norm": st.sampled_from([None, "rms", "layer", "l2"]),
    "qk_norm_epsilon": st.sampled_from([1e-6, 0.1]),
    "attention_sink": st.sampled_from([None, "zero", "learned"]),
    "logit_soft_cap": st.sampled_from([None, 1.5]),
    "scale": st.sampled_from([None, 0.3]),
    "num_memory_key_values": st.sampled_from([None, 1, 3]),
    "talking_heads": st.sampled_from([None, None, "pre", "post", "both"]),
    # Configured, and without effect at inference.
    "dropout": st.sampled_from([0.0, 0.5]),
}
CALLS = {
    "seed": st.integers(0, 2**16),
    "inputs": st.sampled_from(["x", "x, x", "q, v", "q, v, k"]),
    "lengths": st.sampled_from([(3, 5), (6, 4), (1, 7)]),
    "query_mask": st.booleans(),
    "value_mask": st.booleans(),
    "key_mask": st.booleans(),
    "attention_mask": st.sampled_from([None, "ts", "bts", "bnts", "b1ts", "b1s"]),
    "use_causal_mask": st.booleans(),
    "attention_bias": st.sampled_from([None, "ts", "n11", "nts", "b11s", "bnts"]),
    "bias_hides": st.booleans(),
    "segment_ids": st.sampled_from([None, "pair", "one"]),
    "return_attention_scores": st.booleans(),
}


@given(
    constructor=st.fixed_dictionaries(CONSTRUCTORS),
    call=st.fixed_dictionaries(CALLS),
)
def test_any_layer_in_any_call(constructor, call):
    """Output, scores, and the gradients of the inputs and of every weight."""
    rng = np.random.default_rng(call["seed"])
    config = dict(constructor)
    config["num_heads"], config["num_key_value_heads"] = config.pop("heads")
    inputs = call_inputs(call, rng)
    arguments = call_arguments(call, inputs, config["num_heads"], rng)

    layer = keras_mha.MultiHeadAttention(**config, **QUICK)
    widths = [array.shape for array in inputs.values()]
    layer.build(*(widths if len(widths) > 1 else widths * 2))
    randomize(layer, call["seed"])
    variables = variables_of(layer)
    arrays = inputs | weights_of(layer)
    shares_input = call["inputs"] == "x, x"

    def split(tensors):
        given_inputs = dict(zip(inputs, tensors, strict=False))
        if shares_input:
            given_inputs["value"] = given_inputs["query"]
        return given_inputs

    def ours(*tensors):
        return layer(
            **split(tensors),
            **{name: as_tensor(x) for name, x in arguments.items()},
            return_attention_scores=call["return_attention_scores"],
        )

    def definition(arrays):
        given_inputs = split([arrays[name] for name in inputs])
        weights = {name: arrays[name] for name in variables}
        return oracle.multi_head_attention(weights, config, **given_inputs, **arguments)

    expected = definition(arrays)
    cotangents = [rng.normal(size=x.shape) for x in expected]
    if not call["return_attention_scores"]:
        expected, cotangents = expected[:1], cotangents[:1]
    found, gradients = outputs_and_gradients(
        with_variables(ours, list(variables.values())),
        list(arrays.values()),
        cotangents,
    )
    for x, y, what in zip(found, expected, ["output", "scores"], strict=False):
        assert_close(x, y, what)

    def loss(arrays):
        return sum(
            (x * c).sum() for x, c in zip(definition(arrays), cotangents, strict=False)
        )

    for (name, array), gradient in zip(arrays.items(), gradients, strict=True):
        assert_derivative(
            gradient,
            lambda x, name=name: loss(arrays | {name: x}),
            array,
            rng.normal(size=array.shape),
            name,
        )


def call_inputs(call, rng) -> dict[str, np.ndarray]:
    queries, keys = call["lengths"]
    inputs = {"query": rng.normal(size=(2, queries, QUERY_WIDTH))}
    if call["inputs"] in ("q, v", "q, v, k"):
        inputs["value"] = rng.normal(size=(2, keys, VALUE_WIDTH))
    if call["inputs"] == "q, v, k":
        inputs["key"] = rng.normal(size=(2, keys, KEY_WIDTH))
    return {name: rounded(array, "float32") for name, array in inputs.items()}


def call_arguments(call, inputs, heads: int, rng) -> dict[str, Any]:
    queries = inputs["query"].shape[1]
    keys = inputs.get("value", inputs["query"]).shape[1]
    sizes = {"b": 2, "n": heads, "t": queries, "s": keys, "1": 1}

    def booleans(word: str) -> np.ndarray:
        return rng.uniform(size=[sizes[letter] for letter in word]) < 0.7

    arguments: dict[str, Any] = {"use_causal_mask": call["use_causal_mask"]}
    if call["value_mask"]:
        arguments["value_mask"] = booleans("bs")
    # With a single input a query mask may be read as the mask of its keys too, so
    # there it comes with a value mask, which settles that.
    if call["query_mask"] and (call["inputs"] != "x" or call["value_mask"]):
        arguments["query_mask"] = booleans("bt")
    if call["key_mask"] and call["inputs"] == "q, v, k":
        arguments["key_mask"] = booleans("bs")
    if call["attention_mask"] is not None:
        arguments["attention_mask"] = booleans(call["attention_mask"])
    if call["attention_bias"] is not None:
        hides = ~booleans(call["attention_bias"])
        bias = rounded(rng.normal(size=hides.shape), "float32")
        if call["bias_hides"]:
            bias[hides] = -np.inf
        arguments["attention_bias"] = bias
    if call["segment_ids"] == "one" and queries == keys:
        arguments["segment_ids"] = rng.integers(0, 2, size=(2, queries))
    elif call["segment_ids"] is not None:
        arguments["segment_ids"] = tuple(
            rng.integers(0, 2, size=(2, length)) for length in (queries, keys)
        )
    return arguments


def as_tensor(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(as_tensor(x) for x in argument)
    if not isinstance(argument, np.ndarray):
        return argument
    is_int = argument.dtype == np.int64
    return to_tensor(argument, "int32" if is_int else None)


def assert_derivative(gradient, loss, array, direction, name: str) -> None:
    """gradient . d against (loss(x + h d) - loss(x - h d)) / (2 h) in float64."""
    step = 1e-5
    expected = (loss(array + step * direction) - loss(array - step * direction)) / (
        2 * step
    )
    found = (gradient * direction).sum()
    # The terms of the sum carry float32's error each, whatever they add up to.
    size = np.abs(gradient * direction).sum()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=2e-5 * (1 + size), err_msg=f"gradient of {name}"
    )


# -------------------------------------------------------- the definition, one by one

FEATURES = {
    "plain": {},
    "grouped heads": {"num_key_value_heads": 2},
    "rms norm": {"qk_norm": "rms"},
    "layer norm": {"qk_norm": "layer"},
    "l2 norm": {"qk_norm": "l2"},
    "soft cap": {"logit_soft_cap": 1.5},
    "learned sink": {"attention_sink": "learned"},
    "sink of zero": {"attention_sink": "zero"},
    "scale": {"scale": 0.3},
    "gate": {"use_gate": True},
    "learned keys and values": {"num_memory_key_values": 3},
    "heads that talk before": {"talking_heads": "pre"},
    "heads that talk after": {"talking_heads": "post"},
    "all": {
        "num_key_value_heads": 1,
        "qk_norm": "rms",
        "logit_soft_cap": 1.5,
        "attention_sink": "learned",
        "use_gate": True,
        "value_dim": 2,
        "num_memory_key_values": 2,
        "talking_heads": "both",
    },
}


def made(query_shape, value_shape=None, *, num_heads=4, key_dim=3, **config):
    layer = keras_mha.MultiHeadAttention(num_heads, key_dim, **config, **QUICK)
    layer.build(query_shape, value_shape or query_shape)
    randomize(layer)
    return layer


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_attention_over_one_axis_of_several(features):
    # Axis 2 of (B, X, Y, D): each of the B * X rows is a sequence by itself.
    x, y = draw(2, 3, 4, 6), draw(2, 3, 5, 6)
    layer = made(x.shape, y.shape, attention_axes=2, **features)
    output, scores = run(lambda x, y: layer(x, y, return_attention_scores=True), x, y)
    flat_output, flat_scores = oracle.multi_head_attention(
        weights_of(layer), features, x.reshape(6, 4, 6), y.reshape(6, 5, 6)
    )
    assert_close(output, flat_output.reshape(2, 3, 4, 6))
    assert_close(scores, flat_scores.reshape(2, 3, 4, 4, 5))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_attention_over_one_axis_of_a_rank_5_input(axis):
    x = draw(2, 3, 2, 4, 6)
    layer = made(x.shape, attention_axes=axis)
    output, scores = run(lambda x: layer(x, return_attention_scores=True), x)
    # The axis goes beside the features; all others are the batch.
    rows = np.moveaxis(x, axis, -2)
    flat_output, flat_scores = oracle.multi_head_attention(
        weights_of(layer), {}, rows.reshape(-1, *rows.shape[-2:])
    )
    assert_close(output, np.moveaxis(flat_output.reshape(rows.shape), -2, axis))
    length = x.shape[axis]
    assert_close(
        scores, flat_scores.reshape(*rows.shape[:-2], layer.num_heads, length, length)
    )


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_attention_over_several_axes(features):
    # All of (X, Y) attends to all of (X', Y').
    x, y = draw(2, 3, 2, 6), draw(2, 2, 4, 6)
    layer = made(x.shape, y.shape, attention_axes=(1, 2), **features)
    output, scores = run(lambda x, y: layer(x, y, return_attention_scores=True), x, y)
    flat_output, flat_scores = oracle.multi_head_attention(
        weights_of(layer), features, x.reshape(2, 6, 6), y.reshape(2, 8, 6)
    )
    assert_close(output, flat_output.reshape(2, 3, 2, 6))
    assert_close(scores, flat_scores.reshape(2, 4, 3, 2, 2, 4))


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_asking_for_scores_never_changes_the_output(features):
    x = draw(2, 5, 6)
    layer = made(x.shape, sliding_window=2, **features)
    # The second row of the batch has no valid token, so none of its rows sees a key.
    valid = to_tensor(np.array([[True, True, False, True, True], [False] * 5]))
    options = {"value_mask": valid, "use_causal_mask": True}
    (output,) = run(lambda x: layer(x, x, **options), x)
    same, _ = run(lambda x: layer(x, x, return_attention_scores=True, **options), x)
    np.testing.assert_allclose(output, same, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("use_gate", [False, True])
def test_row_that_sees_nothing_gives_the_output_bias(dtype, use_gate):
    layer = made((2, 3, 6), dtype=dtype, use_gate=use_gate)
    mask = to_tensor(np.array([[True], [False], [True]]))
    (output,) = run(lambda x: layer(x, x, attention_mask=mask), draw(2, 3, 6))
    bias = np.broadcast_to(weights_of(layer)["output_bias"], (2, 6))
    np.testing.assert_array_equal(output[:, 1], bias)
    assert np.isfinite(output).all()
    assert (output[:, 0] != bias).any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    # "all" has the other features in it, and compiling each apart takes JAX long.
    [(name, "float32") for name in ("plain", "layer norm", "l2 norm", "all")]
    + [(name, dtype) for name in ("plain", "all") for dtype in ("bfloat16", "float16")],
)
def test_no_gradient_through_rows_that_see_nothing(name, dtype):
    nothing_learned = {"num_memory_key_values": None}  # those are always seen
    layer = made((2, 3, 6), dtype=dtype, **(FEATURES[name] | nothing_learned))
    variables = variables_of(layer)
    mask = to_tensor(np.zeros((3, 3), dtype=bool))
    _, gradients = outputs_and_gradients(
        with_variables(
            lambda x: layer(x, x, attention_mask=mask), list(variables.values())
        ),
        [draw(2, 3, 6), *weights_of(layer).values()],
        [np.ones((2, 3, 6))],
        dtype,
    )
    found = dict(zip(["x", *variables], gradients, strict=True))
    # The output's bias alone is left: it is added to six rows.
    np.testing.assert_array_equal(found.pop("output_bias"), np.full(6, 6.0))
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, 0.0, err_msg=name)


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_bfloat16", 3e-2), ("mixed_float16", 4e-3)]
)
def test_mixed_precision(policy, tolerance):
    layer = made((2, 3, 6), dtype=policy, **FEATURES["all"])
    x = draw(2, 3, 6)
    types = []

    def call(x):
        found = layer(x, return_attention_scores=True)
        types.extend(keras.backend.standardize_dtype(tensor.dtype) for tensor in found)
        return found

    output, scores = run(call, x)
    assert types == [policy.removeprefix("mixed_")] * 2
    expected = oracle.multi_head_attention(weights_of(layer), FEATURES["all"], x)
    size = np.abs(expected[0]).max()
    assert_close(output / size, expected[0] / size, tolerance=tolerance)
    assert_close(scores, expected[1], tolerance=tolerance)


def test_one_input_is_self_attention():
    x = draw(2, 3, 6)
    layer = made(x.shape)
    (alone,) = run(lambda x: layer(x), x)
    (pair,) = run(lambda x: layer(x, x), x)
    np.testing.assert_array_equal(alone, pair)


# ------------------------------------------------------------------ Keras's own layer

KERAS_ARGUMENTS = inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters


class Comparison:
    """One constructor and call, the same for both layers.

    `shapes` are those of query, value and, where it is given, key; one shape alone is
    self-attention. Masks leave every query a key, since Keras gets other rows wrong.
    """

    def __init__(self, *shapes: tuple[int, ...], call: dict | None = None, **config):
        self.shapes, self.config, self.call = shapes, config, call or {}

    def layers(self) -> tuple[Any, Any]:
        config = {"num_heads": 2, "key_dim": 3} | self.config | QUICK
        self.skip_where_keras_crashes()
        unknown = set(config) - set(KERAS_ARGUMENTS)
        if unknown:
            pytest.skip(f"this version of Keras has no {', '.join(sorted(unknown))}")
        theirs = keras.layers.MultiHeadAttention(**config)
        ours = keras_mha.MultiHeadAttention(**config)
        shapes = self.shapes if len(self.shapes) > 1 else self.shapes * 2
        theirs.build(*shapes)
        ours.build(*shapes)
        randomize(theirs)
        ours.set_weights(theirs.get_weights())
        return ours, theirs

    def arrays(self) -> list[np.ndarray]:
        return [draw(*shape, seed=i) for i, shape in enumerate(self.shapes)]

    def function(self, layer: Any, **options: Any) -> Any:
        def call(*tensors):
            tensors = tensors if len(tensors) > 1 else tensors * 2
            masks = {name: as_tensor(x) for name, x in self.call.items()}
            return layer(*tensors, **masks, **options)

        return call

    def skip_where_keras_crashes(self) -> None:
        """TensorFlow's softmax takes at most five axes; Keras may hand it six.

        It does where one axis of a rank-5 input attends and two others do not.
        """
        rank, axes = len(self.shapes[0]), self.config.get("attention_axes")
        if BACKEND == "tensorflow" and rank == 5 and isinstance(axes, int):
            pytest.skip("Keras's own layer cannot run this call on TensorFlow")

    @property
    def keras_crashes_without_scores(self) -> bool:
        """On JAX, Keras's default path takes the width of a key for a value's."""
        widths = {self.config.get(name, 3) for name in ("key_dim", "value_dim")}
        return BACKEND == "jax" and len(widths) > 1


def visible(*shape: int) -> np.ndarray:
    """A mask in which every query sees the first key."""
    mask = draw(*shape, seed=9) > 0
    mask[..., 0] = True
    return mask


def visible_over_two_axes(*shape: int) -> np.ndarray:
    mask = draw(*shape, seed=9) > 0
    mask[..., 0, 0] = True
    return mask


X, Q, V, K = (2, 5, 8), (2, 3, 8), (2, 5, 6), (2, 5, 7)
IMAGE, VIDEO = (2, 3, 4, 8), (2, 3, 2, 4, 8)

COMPARISONS = {
    "self": Comparison(X),
    "cross": Comparison(Q, V),
    "cross with key": Comparison(Q, V, K),
    "more queries than keys": Comparison((2, 7, 8), V),
    "one head": Comparison(X, num_heads=1),
    "value_dim": Comparison(X, value_dim=4),
    "value_dim, cross with key": Comparison(Q, V, K, value_dim=5),
    "no bias": Comparison(X, use_bias=False),
    "output_shape int": Comparison(Q, V, output_shape=5),
    "output_shape tuple": Comparison(Q, V, output_shape=(2, 3)),
    # attention_axes
    "rank 4, all axes": Comparison(IMAGE),
    "rank 4, all axes, cross": Comparison(IMAGE, (2, 5, 2, 6)),
    "rank 4, axis 1": Comparison(IMAGE, attention_axes=1),
    "rank 4, axis 1, cross": Comparison(IMAGE, (2, 5, 4, 6), attention_axes=(1,)),
    "rank 4, axis 2": Comparison(IMAGE, attention_axes=(2,)),
    "rank 4, axis 2, cross": Comparison(IMAGE, (2, 3, 6, 6), attention_axes=2),
    "rank 4, axes 1 and 2": Comparison(IMAGE, attention_axes=(1, 2)),
    "rank 4, axis -2": Comparison(IMAGE, attention_axes=-2),
    "rank 4, axis 2, output_shape": Comparison(
        IMAGE, attention_axes=2, output_shape=(2, 3)
    ),
    "rank 4, axis 2, value_dim": Comparison(IMAGE, attention_axes=2, value_dim=5),
    "rank 5, all axes": Comparison(VIDEO),
    "rank 5, axis 1": Comparison(VIDEO, attention_axes=1),
    "rank 5, axis 3": Comparison(VIDEO, attention_axes=3),
    "rank 5, axes 2 and 3": Comparison(VIDEO, attention_axes=(2, 3)),
    "rank 5, axes 1 and 3, cross": Comparison(
        VIDEO, (2, 2, 2, 5, 6), attention_axes=(1, 3)
    ),
    # masks
    "mask (T, S)": Comparison(Q, V, call={"attention_mask": visible(3, 5)}),
    "mask (B, T, S)": Comparison(Q, V, call={"attention_mask": visible(2, 3, 5)}),
    "mask (1, T, S)": Comparison(Q, V, call={"attention_mask": visible(1, 3, 5)}),
    "mask (B, 1, S)": Comparison(Q, V, call={"attention_mask": visible(2, 1, 5)}),
    "mask (B, N, T, S)": Comparison(Q, V, call={"attention_mask": visible(2, 2, 3, 5)}),
    "mask (B, 1, T, S)": Comparison(Q, V, call={"attention_mask": visible(2, 1, 3, 5)}),
    "mask of ints": Comparison(
        Q, V, call={"attention_mask": visible(2, 3, 5).astype("int64")}
    ),
    "mask over axis 2 of rank 4": Comparison(
        IMAGE, attention_axes=2, call={"attention_mask": visible(2, 3, 4, 4)}
    ),
    "mask over two axes": Comparison(
        IMAGE,
        attention_axes=(1, 2),
        call={"attention_mask": visible_over_two_axes(2, 3, 4, 3, 4)},
    ),
    "value_mask": Comparison(Q, V, call={"value_mask": visible(2, 5)}),
    "value_mask and key_mask": Comparison(
        Q, V, K, call={"value_mask": visible(2, 5), "key_mask": visible(2, 5)[::-1]}
    ),
    "causal": Comparison(X, call={"use_causal_mask": True}),
    "causal, T < S": Comparison(Q, V, call={"use_causal_mask": True}),
    "causal, T > S": Comparison((2, 7, 8), V, call={"use_causal_mask": True}),
    "causal, value_dim": Comparison(X, value_dim=4, call={"use_causal_mask": True}),
    "causal and mask": Comparison(
        Q, V, call={"use_causal_mask": True, "attention_mask": visible(2, 3, 5)}
    ),
    "causal and value_mask": Comparison(
        Q, V, call={"use_causal_mask": True, "value_mask": visible(2, 5)}
    ),
    "causal over axis 1 of rank 4": Comparison(
        IMAGE, attention_axes=1, call={"use_causal_mask": True}
    ),
    "causal over axis 2 of rank 4": Comparison(
        (2, 4, 4, 8), attention_axes=2, call={"use_causal_mask": True}
    ),
    # window and gate
    "window": Comparison(X, sliding_window=2),
    "window of one": Comparison(X, sliding_window=1),
    "window, T < S": Comparison(Q, V, sliding_window=2),
    "window wider than the sequence": Comparison(X, sliding_window=50),
    "causal window": Comparison(X, sliding_window=2, call={"use_causal_mask": True}),
    "window over axis 1 of rank 4": Comparison(
        IMAGE, sliding_window=2, attention_axes=1
    ),
    "gate": Comparison(X, use_gate=True),
    "gate, cross, value_dim": Comparison(Q, V, use_gate=True, value_dim=5),
    "gate, no bias": Comparison(X, use_gate=True, use_bias=False),
    "gate, rank 4, axis 2": Comparison(IMAGE, use_gate=True, attention_axes=2),
    # dropout
    "dropout at inference": Comparison(X, dropout=0.5, call={"training": False}),
    "dropout outside of a model": Comparison(X, dropout=0.5),
    "dropout at inference, causal": Comparison(
        X, dropout=0.5, call={"training": False, "use_causal_mask": True}
    ),
}


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=COMPARISONS.keys())
def test_same_output_and_scores_as_keras(comparison):
    ours, theirs = comparison.layers()
    if theirs.attention_axes != ours.attention_axes:
        pytest.skip("this version of Keras takes negative axes for other ones")

    def both(*tensors):
        scored = {"return_attention_scores": True}
        output = comparison.function(ours)(*tensors)
        scored_output, scores = comparison.function(ours, **scored)(*tensors)
        expected, expected_scores = comparison.function(theirs, **scored)(*tensors)
        found = [output, scored_output, scores, expected, expected_scores]
        if not comparison.keras_crashes_without_scores:
            found.append(comparison.function(theirs)(*tensors))
        return tuple(found)

    output, scored_output, scores, expected, expected_scores, *default = run(
        both, *comparison.arrays()
    )
    assert_close(output, expected, "output")
    assert_close(scored_output, expected, "output with scores")
    assert_close(scores, expected_scores, "scores")
    for unscored in default:
        assert_close(output, unscored, "output of Keras's default path")


TRAINED = ["self", "cross with key", "value_dim", "causal and mask", "gate"]


@pytest.mark.parametrize("name", TRAINED)
def test_same_gradients_as_keras(name):
    comparison = COMPARISONS[name]
    ours, theirs = comparison.layers()
    arrays = comparison.arrays()

    def gradients(layer, **options):
        function = comparison.function(layer, **options)
        return outputs_and_gradients(
            with_variables(
                lambda *x: function(*x)[0] if options else function(*x), layer.weights
            ),
            [*arrays, *layer.get_weights()],
            [draw(2, arrays[0].shape[1], 8, seed=5)],
        )[1]

    crashes = comparison.keras_crashes_without_scores
    expected = gradients(theirs, **{"return_attention_scores": True} if crashes else {})
    for x, y in zip(gradients(ours), expected, strict=True):
        assert_close(x, y)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mask_of_floats_is_read_as_keras_reads_it():
    mask = np.where(visible(2, 3, 5), 0.5, 0.0)
    comparison = Comparison(Q, V, call={"attention_mask": mask})
    ours, theirs = comparison.layers()
    (found,) = run(comparison.function(ours), *comparison.arrays())
    (expected,) = run(comparison.function(theirs), *comparison.arrays())
    assert_close(found, expected)


# ------------------------------------------------------------- masks that tensors carry

TOKENS = np.array([[3, 1, 4, 0, 0], [1, 5, 2, 6, 0]])
OTHER_TOKENS = np.array([[2, 7, 0], [1, 0, 0]])


def embedded(tokens: np.ndarray) -> Any:
    embedding = keras.layers.Embedding(10, 8, mask_zero=True)
    embedding.build()
    embedding.embeddings.assign(draw(10, 8).astype("float32"))
    return embedding(to_tensor(tokens.astype("int32")))


def masked(tokens: np.ndarray) -> Any:
    values = np.where((tokens == 0)[..., None], 0.0, draw(10, 8)[tokens])
    return keras.layers.Masking()(to_tensor(values))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("source", [embedded, masked])
def test_implicit_masks_of_self_attention(source, causal):
    ours, theirs = Comparison(X).layers()
    x, y = source(TOKENS), source(TOKENS)
    found = to_numpy(ours(x, x, use_causal_mask=causal))
    expected = to_numpy(theirs(y, y, use_causal_mask=causal))
    valid = TOKENS != 0
    assert_close(found[valid], expected[valid])
    # A query that is padding attends to nothing.
    bias = np.broadcast_to(weights_of(ours)["output_bias"], found[~valid].shape)
    assert_close(found[~valid], bias)


@pytest.mark.parametrize("source", [embedded, masked])
def test_implicit_masks_of_cross_attention(source):
    ours, theirs = Comparison((2, 3, 8), (2, 5, 8)).layers()
    options = {"return_attention_scores": True}
    found = ours(source(OTHER_TOKENS), source(TOKENS), **options)
    expected = theirs(source(OTHER_TOKENS), source(TOKENS), **options)
    valid = OTHER_TOKENS != 0
    assert_close(to_numpy(found[0])[valid], to_numpy(expected[0])[valid])
    scores = np.moveaxis(to_numpy(found[1]), 2, 1)
    expected_scores = np.moveaxis(to_numpy(expected[1]), 2, 1)
    assert_close(scores[valid], expected_scores[valid])
    assert (scores[~valid] == 0).all()
    hidden = np.broadcast_to((TOKENS == 0)[:, None, None], scores.shape)
    assert (scores[hidden] == 0).all()


def test_implicit_mask_and_attention_mask():
    mask = visible(2, 5, 5)
    ours, theirs = Comparison(X).layers()
    x, y = embedded(TOKENS), embedded(TOKENS)
    found = to_numpy(ours(x, x, attention_mask=to_tensor(mask)))
    expected = to_numpy(theirs(y, y, attention_mask=to_tensor(mask)))
    assert_close(found[TOKENS != 0], expected[TOKENS != 0])


def test_implicit_mask_of_a_single_input_is_that_of_its_keys_too():
    ours, _ = Comparison(X).layers()
    x = embedded(TOKENS)
    np.testing.assert_array_equal(to_numpy(ours(x)), to_numpy(ours(x, x)))


def test_explicit_query_mask_is_the_same_as_the_implicit_one():
    ours, _ = Comparison(X).layers()
    x = embedded(TOKENS)
    plain = to_tensor(to_numpy(x))
    valid = to_tensor(TOKENS != 0)
    found = ours(plain, plain, query_mask=valid, value_mask=valid)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(ours(x, x)))


def test_the_callers_tensors_keep_their_masks():
    ours, _ = Comparison(X).layers()
    x = embedded(TOKENS)
    ours(x, x)
    np.testing.assert_array_equal(to_numpy(x._keras_mask), TOKENS != 0)


@pytest.mark.parametrize("scores", [False, True])
def test_output_carries_the_mask_of_the_query(scores):
    ours, _ = Comparison((2, 3, 8), (2, 5, 8)).layers()
    output = ours(
        embedded(OTHER_TOKENS), embedded(TOKENS), return_attention_scores=scores
    )
    output = output[0] if scores else output
    np.testing.assert_array_equal(to_numpy(output._keras_mask), OTHER_TOKENS != 0)


def test_functional_model_with_implicit_masks():
    ours, theirs = Comparison(X).layers()
    embedding = keras.layers.Embedding(10, 8, mask_zero=True)
    # The average is over the valid tokens, so Keras's other rows do not come in.
    pool = keras.layers.GlobalAveragePooling1D()
    tokens = keras.Input((None,), dtype="int32")
    # Keras's layer takes the mask off its inputs, so each gets a tensor of its own.
    x, y = embedding(tokens), embedding(tokens)
    model = keras.Model(tokens, [pool(ours(x, x)), pool(theirs(y, y))])
    found, expected = model(to_tensor(TOKENS.astype("int32")))
    assert_close(to_numpy(found), to_numpy(expected))
