"""Positions in `keras_mha.MultiHeadAttention`, and their biases in every kernel.

Against the float64 definition, forward and backward; at lengths of several tiles too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from keras_mha import masks
from tests import oracle
from tests.helpers import (
    call_at_once,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
    with_variables,
)
from tests.layers.test_multi_head_attention_numbers import (
    QUICK,
    as_tensor,
    assert_close,
    assert_derivative,
    randomize,
    run,
    variables_of,
)

BACKEND = keras.backend.backend()
# PyTorch is the backend that ships a fused kernel for every device.
FUSED = ["fused"] if BACKEND == "torch" else []
IMPLEMENTATIONS = ["reference", "blockwise", *FUSED]

WIDTH = 6
HALF_TYPES = {"bfloat16": 3e-2, "float16": 4e-3}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}

# As the definition has them; `position_layer` makes the layers of them.
POSITIONS = {
    "rotary": {"kind": "rotary"},
    "rotary, interleaved": {"kind": "rotary", "rotary_dim": 2, "interleaved": True},
    "rotary, yarn": {"kind": "rotary", "scaling": YARN, "max_wavelength": 100.0},
    "rotary, dynamic": {"kind": "rotary", "scaling": DYNAMIC},
    "alibi": {"kind": "alibi"},
    "relative": {"kind": "relative"},
    "relative, one-sided": {
        "kind": "relative",
        "num_buckets": 6,
        "max_distance": 9,
        "bidirectional": False,
    },
}
KINDS = ["rotary", "alibi", "relative"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def position_layer(config: Mapping[str, Any]) -> Any:
    options = dict(config)
    kind = options.pop("kind")
    if kind == "rotary":
        return keras_mha.RotaryEmbedding(**options)
    if kind == "mixed rotary":
        return keras_mha.MixedRotaryEmbedding(**options)
    if kind == "alibi":
        return keras_mha.ALiBi(**options)
    return keras_mha.RelativePositionBias(initializer="zeros", **options)


def made(
    position: str,
    *shapes: tuple[int, ...],
    num_heads: int = 4,
    key_dim: int = 4,
    **config: Any,
) -> Any:
    """A built layer with numbers of its own in every weight."""
    layer = keras_mha.MultiHeadAttention(
        num_heads,
        key_dim,
        position=position_layer(POSITIONS[position]),
        **config,
        **QUICK,
    )
    layer.build(*(shapes if len(shapes) > 1 else shapes * 2))
    randomize(layer)
    return layer


def all_variables_of(layer: Any) -> dict[str, Any]:
    found = variables_of(layer)
    for name in ("table", "frequencies"):
        if hasattr(layer.position, name):
            found[f"position_{name}"] = getattr(layer.position, name)
    return found


def weights_of(layer: Any) -> dict[str, np.ndarray]:
    return {name: to_numpy(x.value) for name, x in all_variables_of(layer).items()}


def by_definition(layer: Any, position: str, *inputs: np.ndarray, **arguments: Any):
    config = {"position": POSITIONS[position]}
    return oracle.multi_head_attention(weights_of(layer), config, *inputs, **arguments)


# --------------------------------------------------- the definition, calls at random

CONSTRUCTORS = {
    "position": st.sampled_from(list(POSITIONS)),
    "heads": st.sampled_from([(1, None), (3, None), (4, 2), (2, 1)]),
    "key_dim": st.sampled_from([4, 6]),
    "sliding_window": st.sampled_from([None, 2]),
    "qk_norm": st.sampled_from([None, "rms"]),
    "attention_sink": st.sampled_from([None, "learned"]),
    "logit_soft_cap": st.sampled_from([None, 1.5]),
    "num_memory_key_values": st.sampled_from([None, 2]),
    # Configured, and without effect at inference.
    "dropout": st.sampled_from([0.0, 0.5]),
}
CALLS = {
    "seed": st.integers(0, 2**16),
    "cross": st.booleans(),
    "lengths": st.sampled_from([(6, 6), (6, 6), (3, 5), (6, 4), (1, 7)]),
    "position_ids": st.sampled_from([None, None, "t", "bt", "t, s", "bt, bs"]),
    "furthest": st.sampled_from([8, 40, 100_000]),
    "segment_ids": st.sampled_from([None, "one", "pair"]),
    "hidden_share": st.sampled_from([0.0, 0.3, 0.9]),
    "use_causal_mask": st.booleans(),
    "attention_bias": st.sampled_from([None, "ts", "n11", "b11s", "bnts"]),
    "path": st.sampled_from(["scores", None, False, True]),
}


# Each example is a program of its own to compile; see `tests/conftest.py`.
@settings(max_examples=settings().max_examples // (2 if BACKEND == "jax" else 1))
@given(
    constructor=st.fixed_dictionaries(CONSTRUCTORS),
    call=st.fixed_dictionaries(CALLS),
)
def test_any_layer_in_any_call(constructor, call):
    """Output, scores, and the gradients of the inputs and of every weight."""
    rng = np.random.default_rng(call["seed"])
    config = dict(constructor)
    position = POSITIONS[config.pop("position")]
    config["num_heads"], config["num_key_value_heads"] = config.pop("heads")
    inputs = call_inputs(call, rng)
    arguments = call_arguments(call, inputs, config["num_heads"], position, rng)
    with_scores = call["path"] == "scores"

    layer = keras_mha.MultiHeadAttention(
        **config,
        position=position_layer(position),
        flash_attention=None if with_scores else call["path"],
        **QUICK,
    )
    widths = [array.shape for array in inputs.values()]
    layer.build(*(widths if len(widths) > 1 else widths * 2))
    randomize(layer, call["seed"])
    variables = all_variables_of(layer)
    arrays = inputs | weights_of(layer)

    def ours(*tensors):
        return layer(
            **dict(zip(inputs, tensors, strict=True)),
            **{name: as_tensor(x) for name, x in arguments.items()},
            return_attention_scores=with_scores,
        )

    def definition(arrays):
        return oracle.multi_head_attention(
            {name: arrays[name] for name in variables},
            config | {"position": position},
            **{name: arrays[name] for name in inputs},
            **arguments,
        )

    expected = definition(arrays)[: 2 if with_scores else 1]
    cotangents = [rng.normal(size=x.shape) for x in expected]
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
    inputs = {"query": rng.normal(size=(2, queries, WIDTH))}
    if call["cross"]:
        inputs["value"] = rng.normal(size=(2, keys, WIDTH))
    return {name: rounded(array, "float32") for name, array in inputs.items()}


def call_arguments(call, inputs, heads: int, position, rng) -> dict[str, Any]:
    queries = inputs["query"].shape[1]
    keys = inputs.get("value", inputs["query"]).shape[1]
    sizes = {"b": 2, "n": heads, "t": queries, "s": keys, "1": 1}

    def shape(word: str) -> list[int]:
        return [sizes[letter] for letter in word]

    arguments: dict[str, Any] = {"use_causal_mask": call["use_causal_mask"]}
    if call["hidden_share"]:
        seen = rng.uniform(size=(2, keys)) >= call["hidden_share"]
        arguments["value_mask"] = seen
    if call["attention_bias"] is not None:
        bias = rng.normal(size=shape(call["attention_bias"]))
        arguments["attention_bias"] = rounded(bias, "float32")
    if call["position_ids"] is not None:
        # Far apart, biases are too large for float32 to tell neighbours apart, and so
        # are the angles of frequencies that are known at the call alone.
        exact = position["kind"] == "rotary" and position.get("scaling") != DYNAMIC
        furthest = call["furthest"] if exact else min(call["furthest"], 40)
        words = call["position_ids"].split(", ")
        ids = tuple(rng.integers(0, furthest, size=shape(word)) for word in words)
        if len(ids) == 2:
            arguments["position_ids"] = ids
        elif queries == keys:
            arguments["position_ids"] = ids[0]
    if call["segment_ids"] == "one" and queries == keys:
        arguments["segment_ids"] = rng.integers(0, 2, size=(2, queries))
    elif call["segment_ids"] is not None:
        arguments["segment_ids"] = tuple(
            rng.integers(0, 2, size=(2, length)) for length in (queries, keys)
        )
    return arguments


# -------------------------------------------------------- the definition, one by one


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_layer(position):
    # 9 tokens are beyond the length from which "dynamic" counts.
    x = draw(2, 9, WIDTH)
    layer = made(position, x.shape)
    output, scores = run(lambda x: layer(x, return_attention_scores=True), x)
    expected, expected_scores = by_definition(layer, position, x)
    assert_close(output, expected)
    assert_close(scores, expected_scores)


@pytest.mark.parametrize("position", ["rotary, dynamic", "alibi", "relative"])
def test_cross_attention_with_positions_of_its_own_for_each_side(position):
    x, y = draw(2, 3, WIDTH), draw(2, 5, WIDTH)
    ids = np.array([7, 0, 30]), np.array([[0, 1, 2, 3, 4], [9, 7, 5, 3, 31]])
    layer = made(position, x.shape, y.shape, num_key_value_heads=2)
    (found,) = run(lambda x, y: layer(x, y, position_ids=as_tensor(ids)), x, y)
    assert_close(found, by_definition(layer, position, x, y, position_ids=ids)[0])


@pytest.mark.parametrize("position", KINDS)
def test_differences_of_positions_matter_and_nothing_else(position):
    x = draw(1, 5, WIDTH)
    layer = made(position, x.shape)
    order = np.array([3, 0, 4, 1, 2])

    def call(x):
        return (
            layer(x),
            layer(x, position_ids=to_tensor(100_000 + np.arange(5), "int32")),
            layer(x, position_ids=to_tensor(2 * np.arange(5), "int32")),
            layer(keras.ops.take(x, to_tensor(order, "int32"), axis=1)),
        )

    counted, shifted, spread, permuted = run(call, x)
    assert_close(shifted, counted)
    assert np.abs(spread - counted).max() > 1e-3
    assert np.abs(permuted - counted[:, order]).max() > 1e-3


@pytest.mark.parametrize("position", KINDS)
def test_one_array_of_positions_is_a_pair_of_it(position):
    x, ids = draw(2, 4, WIDTH), np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    layer = made(position, x.shape)
    one, pair = run(
        lambda x: (
            layer(x, position_ids=as_tensor(ids)),
            layer(x, x, position_ids=as_tensor((ids, ids))),
        ),
        x,
    )
    assert_close(one, pair)
    assert_close(one, by_definition(layer, position, x, position_ids=ids)[0])


# --------------------------------------------------------------------------- segments


@pytest.mark.parametrize("position", KINDS)
def test_packed_segments_are_as_if_alone(position):
    x, ids = draw(1, 7, WIDTH), np.array([[3, 3, 3, 0, 0, 0, 0]])
    layer = made(position, x.shape)
    packed, first, second = run(
        lambda x: (
            layer(x, segment_ids=as_tensor(ids)),
            layer(x[:, :3]),
            layer(x[:, 3:]),
        ),
        x,
    )
    assert_close(packed, np.concatenate([first, second], axis=1))


@pytest.mark.parametrize("position", ["rotary", "rotary, dynamic", "relative"])
def test_positions_restart_at_each_change_of_segment(position):
    # An id that comes again starts a count of its own, and sees its earlier tokens.
    x, y = draw(2, 6, WIDTH), draw(2, 7, WIDTH)
    ids = (
        np.array([[4, 4, 4, 1, 1, 4], [0, 0, 0, 0, 0, 0]]),
        np.array([[1, 4, 4, 4, 4, 1, 1], [0, 2, 0, 0, 0, 0, 0]]),
    )
    # The same, with the positions written out.
    places = (
        np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
        np.array([[0, 0, 1, 2, 3, 0, 1], [0, 0, 0, 1, 2, 3, 4]]),
    )
    layer = made(position, x.shape, y.shape)

    def call(x, y):
        segments = {"segment_ids": as_tensor(ids)}
        return (
            layer(x, y, **segments),
            layer(x, y, position_ids=as_tensor(places), **segments),
        )

    counted, written = run(call, x, y)
    expected, _ = by_definition(layer, position, x, y, segment_ids=ids)
    assert_close(counted, expected)
    assert_close(written, expected)


@pytest.mark.parametrize("position", KINDS)
def test_positions_restart_in_self_attention(position):
    # The last two tokens see the first three, at which they were counted anew.
    x, ids = draw(1, 7, WIDTH), np.array([[4, 4, 4, 1, 1, 4, 4]])
    layer = made(position, x.shape)
    (found,) = run(lambda x: layer(x, segment_ids=as_tensor(ids)), x)
    assert_close(found, by_definition(layer, position, x, segment_ids=ids)[0])


@pytest.mark.parametrize("position", KINDS)
def test_position_ids_go_before_the_count_in_segments(position):
    x, ids = draw(1, 4, WIDTH), np.array([[2, 2, 5, 5]])
    places = np.array([0, 6, 0, 2])
    layer = made(position, x.shape)
    options = {"segment_ids": ids, "position_ids": places}
    (found,) = run(
        lambda x: layer(x, **{name: as_tensor(i) for name, i in options.items()}), x
    )
    assert_close(found, by_definition(layer, position, x, **options)[0])


# ---------------------------------------------------------------- with other features


def test_scores_under_dropout_are_those_before_it():
    x = draw(2, 5, WIDTH)
    layer = made("relative", x.shape, dropout=0.5, seed=1)
    scores = layer(to_tensor(x), return_attention_scores=True, training=True)[1]
    assert_close(to_numpy(scores), by_definition(layer, "relative", x)[1])


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("position", KINDS)
def test_mixed_precision_far_from_zero(position, dtype):
    # No half type holds these positions.
    x, ids = draw(2, 5, WIDTH), 100_003 + np.array([0, 1, 4, 5, 9])
    layer = made(position, x.shape, dtype=f"mixed_{dtype}", num_key_value_heads=2)
    types = []

    def call(x):
        output, scores = layer(
            x, position_ids=as_tensor(ids), return_attention_scores=True
        )
        types.append(keras.backend.standardize_dtype(output.dtype))
        return output, scores

    output, scores = run(call, x)
    assert types == [dtype]
    expected = by_definition(layer, position, x, position_ids=ids)
    size = np.abs(expected[0]).max()
    tolerance = HALF_TYPES[dtype]
    assert_close(output / size, expected[0] / size, tolerance=tolerance)
    assert_close(scores, expected[1], tolerance=tolerance)


@pytest.mark.parametrize("position", KINDS)
def test_no_gradient_through_rows_that_see_nothing(position):
    x = draw(2, 3, WIDTH)
    layer = made(position, x.shape, flash_attention=True)
    variables = all_variables_of(layer)
    hidden = to_tensor(np.zeros((3, 3), dtype=bool))
    _, gradients = outputs_and_gradients(
        with_variables(
            lambda x: layer(x, attention_mask=hidden), list(variables.values())
        ),
        [x, *weights_of(layer).values()],
        [np.ones(x.shape)],
    )
    found = dict(zip(["x", *variables], gradients, strict=True))
    del found["output_bias"]
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, 0.0, err_msg=name)


# ------------------------------------------------------------------------- many tiles

# Longer than a tile of 512 rows, and no multiple of one.
LONG = 600
LONG_SEGMENTS = np.repeat([4, 1, 4, 7], [70, 250, 200, 80])[None]
LONG_CALLS = {
    "causal, whichever kernel": (None, {"use_causal_mask": True}),
    "positions": (True, {"position_ids": np.random.default_rng(0).permutation(LONG)}),
    "segments": (True, {"segment_ids": LONG_SEGMENTS}),
}


@pytest.mark.parametrize("call", LONG_CALLS)
@pytest.mark.parametrize("position", KINDS)
def test_long_sequences(position, call):
    x = draw(1, LONG, WIDTH)
    flash_attention, arguments = LONG_CALLS[call]
    layer = made(position, x.shape, num_heads=2, flash_attention=flash_attention)
    tensors = {name: as_tensor(value) for name, value in arguments.items()}
    (found,) = run(lambda x: layer(x, **tensors), x)
    assert_close(found, by_definition(layer, position, x, **arguments)[0])


def test_gradients_of_long_sequences():
    x, y = draw(1, LONG, WIDTH), draw(1, 530, WIDTH)
    ids = np.arange(LONG) // 2, np.arange(530)
    cotangent = draw(1, LONG, WIDTH, seed=1)
    found = {}
    for flash_attention in (True, False):
        layer = made(
            "relative",
            x.shape,
            y.shape,
            num_heads=2,
            num_key_value_heads=1,
            flash_attention=flash_attention,
            sliding_window=300,
            # A number added to all scores of a row changes nothing, so that of a key's
            # bias the gradient would be what rounding leaves of zero.
            use_bias=False,
        )
        variables = all_variables_of(layer)
        found[flash_attention] = outputs_and_gradients(
            with_variables(
                lambda x, y, layer=layer: layer(x, y, position_ids=as_tensor(ids)),
                list(variables.values()),
            ),
            [x, y, *weights_of(layer).values()],
            [cotangent],
        )
    (output,), gradients = found[True]
    (expected_output,), expected_gradients = found[False]
    assert_close(output, expected_output)
    names = ["query", "value", *variables]
    for name, one, other in zip(names, gradients, expected_gradients, strict=True):
        # Sums over hundreds of tokens: the error goes with the largest.
        size = max(1.0, np.abs(other).max())
        assert_close(one / size, other / size, name)


# ------------------------------------------------------ biases of the attention alone


def bias_layer(kind: str, heads: int) -> tuple[Any, np.ndarray]:
    """A layer of biases by itself, and its table (empty for ALiBi)."""
    if kind == "alibi":
        return keras_mha.ALiBi(heads), np.zeros((0, heads))
    layer = keras_mha.RelativePositionBias(heads, initializer="zeros")
    layer(to_tensor(np.arange(2), "int32"))
    table = rounded(draw(32, heads), "float32")
    layer.table.assign(table.astype("float32"))
    return layer, table


def check_attention(
    kind: str,
    implementation: str,
    *,
    lengths: tuple[int, int],
    positions: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    heads: tuple[int, int] = (2, 1),
    batch: int = 2,
    dtype: str = "float32",
    mask: tuple[Any, np.ndarray] | None = None,
    bias: np.ndarray | None = None,
    table_learns: bool = True,
    **options: Any,
) -> None:
    """Output and all gradients, the table's too, against the definition.

    `positions` are those of the queries, (B, T) or (1, T), and of the keys.
    """
    (queries, keys), (N, K) = lengths, heads
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.normal(size=(batch, queries, N, 4)),
        "key": rng.normal(size=(batch, keys, K, 4)),
        "value": rng.normal(size=(batch, keys, K, 3)),
    }
    arrays = {name: rounded(array, dtype) for name, array in arrays.items()}
    cotangent = rounded(rng.normal(size=(batch, queries, N, 3)), dtype)
    layer, table = bias_layer(kind, N)
    layer.trainable = table_learns
    learned = [layer.table] if kind == "relative" and table_learns else []

    def ours(query, key, value):
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            position_bias=layer.bias(*(as_tensor(ids) for ids in positions)),
            mask=None if mask is None else mask[0],
            bias=None if bias is None else to_tensor(bias),
            implementation=implementation,
            **options,
        )

    def call(query, key, value, *tables):
        # The table stays in float32, as a layer's variables do in mixed precision.
        tables = [keras.ops.cast(x, "float32") for x in tables]
        return with_variables(ours, learned)(query, key, value, *tables)

    table = rounded(table, dtype if learned else "float32")
    tables = [table] if learned else []
    (found,), gradients = outputs_and_gradients(
        call, [*arrays.values(), *tables], [cotangent], dtype
    )

    places = [
        np.arange(length) if ids is None else ids
        for ids, length in zip(positions, lengths, strict=True)
    ]
    if kind == "alibi":
        added = oracle.alibi_bias(oracle.alibi_slopes(N), *places)
    else:
        added = oracle.relative_position_bias(table, *places)
    added = np.broadcast_to(added, (batch, N, queries, keys))
    everything = arrays | options
    everything["bias"] = added if bias is None else added + bias
    everything["mask"] = None if mask is None else mask[1]
    expected, _ = oracle.dot_product_attention(**everything)
    by_name = oracle.dot_product_attention_gradients(
        **everything, output_cotangent=cotangent
    )
    expected_gradients = [by_name[f"d{name}"] for name in arrays]
    if learned:
        buckets = oracle.relative_position_buckets(*places)
        expected_gradients.append(
            oracle.relative_position_table_gradient(by_name["dbias"], buckets, 32)
        )

    tolerance = HALF_TYPES.get(dtype, 1e-5)
    names = ["output", "dquery", "dkey", "dvalue", "dtable"]
    for name, one, other in zip(
        names, [found, *gradients], [expected, *expected_gradients], strict=False
    ):
        size = max(1.0, np.abs(other).max())
        assert_close(one / size, other / size, name, tolerance)


# Of both sides counted, see the many tiles below.
SMALL_CASES = {
    "query's positions, causal": {
        "positions": (np.array([[9, 0, 200, 3, 4]]), None),
        "mask": (masks.Causal(), np.tri(5, 7, dtype=bool)),
        "heads": (3, 3),
    },
    "key's positions, a row each, and a bias that hides": {
        "positions": (
            None,
            np.array([[6, 5, 4, 3, 2, 1, 0], [0, 10, 20, 30, 40, 5, 6]]),
        ),
        "bias": np.where(np.arange(5)[:, None] == 1, -np.inf, np.arange(7) / 8),
    },
    "both positions, a row each, and a bias": {
        "positions": (
            np.array([[0, 1, 2, 3, 4], [7, 7, 7, 0, 0]]),
            np.array([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]),
        ),
        "bias": rounded(draw(2, 2, 5, 7), "float32"),
        "scale": 0.3,
    },
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SMALL_CASES.values(), ids=SMALL_CASES.keys())
@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_bias_in_every_kernel(kind, case, implementation):
    check_attention(kind, implementation, lengths=(5, 7), **case)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_bias_is_added_after_the_soft_cap(implementation):
    options = {"logit_soft_cap": 0.5, "sink": 0.3}
    check_attention("relative", implementation, lengths=(5, 7), **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("alibi", "float16"), ("relative", "bfloat16")]
)
def test_bias_in_half_types(kind, implementation, dtype):
    check_attention(kind, implementation, lengths=(5, 7), dtype=dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_biases_of_far_keys_are_told_apart_in_half_types(implementation, dtype):
    # A thousand steps away the biases are near -62 and -4 and differ by 1/16 and 1/256
    # from key to key, which a bfloat16 of that size does not hold.
    query, key = np.zeros((1, 1, 2, 4)), np.zeros((1, 40, 2, 4))
    value = np.broadcast_to(np.arange(40.0)[:, None, None] / 40, (1, 40, 2, 4))
    layer = keras_mha.ALiBi(2)
    ids = np.array([[1000]]), np.arange(40)[None]
    found = call_at_once(
        lambda *tensors: keras_mha.dot_product_attention(
            *tensors,
            position_bias=layer.bias(*(as_tensor(i) for i in ids)),
            implementation=implementation,
        ),
        [to_tensor(x, dtype) for x in (query, key, value)],
    )
    bias = oracle.alibi_bias(oracle.alibi_slopes(2), *ids)
    value = rounded(value, dtype)
    expected, _ = oracle.dot_product_attention(query, key, value, bias=bias)
    assert_close(to_numpy(found), expected, tolerance=HALF_TYPES[dtype] / 4)


T, S = 600, 700
i, j = np.arange(T)[:, None], np.arange(S)
VALID = np.random.default_rng(1).uniform(size=(1, S)) < 0.6
LONG_MASKS = {
    "none": lambda: None,
    "causal": lambda: (masks.Causal(), j <= i),
    "window and padding": lambda: (
        masks.SlidingWindow(200) & masks.Padding(to_tensor(VALID)),
        (np.abs(i - j) < 200) & VALID[:, None, None],
    ),
}


@pytest.mark.parametrize("implementation", ["blockwise", *FUSED])
@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_bias_over_many_tiles(kind, mask, implementation):
    check_attention(
        kind,
        implementation,
        lengths=(T, S),
        heads=(2, 1),
        batch=1,
        mask=LONG_MASKS[mask](),
        # Beyond a few rows torch's kernel has the gradient of a bias with these masks
        # only, and says so.
        table_learns=implementation != "fused" or mask in ("none", "causal"),
    )


@pytest.mark.parametrize("implementation", ["blockwise", *FUSED])
@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_bias_of_given_positions_over_many_tiles(kind, implementation):
    # In no order, so that no tile's corners bound its distances.
    rng = np.random.default_rng(2)
    positions = rng.integers(0, 60, size=(2, T)), rng.integers(0, 60, size=(1, 530))
    check_attention(
        kind,
        implementation,
        lengths=(T, 530),
        positions=positions,
        heads=(1, 1),
        table_learns=implementation != "fused",
    )


# ------------------------------------------------------------------------ as a layer


def test_the_holder_tells_how_many_heads_there_are():
    for name in ("alibi", "relative"):
        layer = made(name, (2, 5, WIDTH), num_heads=3)
        assert layer.position.num_heads == 3
    alibi = made("alibi", (2, 5, WIDTH), num_heads=6).position
    np.testing.assert_allclose(alibi.slopes, oracle.alibi_slopes(6))


@pytest.mark.parametrize("position", POSITIONS)
def test_config_comes_back(position):
    layer = keras_mha.MultiHeadAttention(
        4, 8, position=position_layer(POSITIONS[position])
    )
    config = json.loads(json.dumps(layer.get_config()))
    revived = keras_mha.MultiHeadAttention.from_config(config)
    assert json.loads(json.dumps(revived.get_config())) == config
    assert type(revived.position) is type(layer.position)
    for name in set(POSITIONS[position]) - {"kind"}:
        assert getattr(revived.position, name) == POSITIONS[position][name]


def test_a_layer_builds_its_position_from_its_build_config():
    layer = made("relative", (2, 5, WIDTH), (2, 7, WIDTH))
    revived = keras_mha.MultiHeadAttention.from_config(layer.get_config())
    revived.build_from_config(layer.get_build_config())
    shapes = [tuple(weight.shape) for weight in layer.weights]
    assert [tuple(weight.shape) for weight in revived.weights] == shapes
    assert tuple(revived.position.table.shape) == (32, 4)


def model_with(position: str | None) -> keras.Model:
    """A model of any length, with positions counted and given."""
    x = keras.Input((None, WIDTH))
    ids = keras.Input((None,), dtype="int32")
    layer = keras_mha.MultiHeadAttention(
        4,
        4,
        num_key_value_heads=2,
        name="attention",
        position=None if position is None else position_layer(POSITIONS[position]),
    )
    output = layer(x, use_causal_mask=True)
    if position is not None:
        output = layer(output, position_ids=ids)
    model = keras.Model([x, ids], output)
    randomize(layer)
    return model


@pytest.mark.parametrize(
    "position", ["rotary, yarn", "rotary, dynamic", "alibi", "relative, one-sided"]
)
def test_model_of_any_length_is_saved(position, tmp_path):
    model = model_with(position)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    layer = revived.get_layer("attention")
    assert type(layer.position) is type(model.get_layer("attention").position)
    config, weights = {"position": POSITIONS[position]}, weights_of(layer)
    for which, tokens in [(model, 8), (revived, 8), (revived, 3)]:
        x = draw(2, tokens, WIDTH)
        ids = np.random.default_rng(0).integers(0, 30, size=(2, tokens))
        (found,) = run(lambda *x, m=which: m(list(x)), x, ids.astype("int32"))
        once, _ = oracle.multi_head_attention(weights, config, x, use_causal_mask=True)
        expected, _ = oracle.multi_head_attention(
            weights, config, once, position_ids=ids
        )
        size = np.abs(expected).max()
        assert_close(found / size, expected / size)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_weights_of_a_layer_without_positions_load_into_one_with(position, tmp_path):
    # Neither has weights of its own.
    plain, placed = model_with(None), model_with(position)
    randomize(plain.get_layer("attention"), seed=1)
    plain.save_weights(tmp_path / "model.weights.h5")
    placed.load_weights(tmp_path / "model.weights.h5")
    expected = plain.get_layer("attention").get_weights()
    found = placed.get_layer("attention").get_weights()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_moves_the_table():
    model = model_with("relative")
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    table = model.get_layer("attention").position.table
    before = to_numpy(table.value)
    inputs = [draw(4, 5, WIDTH), np.tile(np.arange(5), (4, 1)).astype("int32")]
    model.fit(inputs, draw(4, 5, WIDTH, seed=1), epochs=1, verbose=0)
    moved = np.abs(to_numpy(table.value) - before).max(axis=1) > 0
    # Distances of -4 .. 4: later keys are in the buckets from 16 on.
    expected = np.isin(np.arange(32), [0, 1, 2, 3, 4, 17, 18, 19, 20])
    np.testing.assert_array_equal(moved, expected)


def test_two_layers_may_share_a_table():
    # As T5's layers do.
    shared = keras_mha.RelativePositionBias()
    x = keras.Input((5, WIDTH))
    layers = [
        keras_mha.MultiHeadAttention(2, 4, position=shared, use_bias=False)
        for _ in range(2)
    ]
    model = keras.Model(x, layers[1](layers[0](x)))
    assert len(model.weights) == 4 + 4 + 1
    assert layers[0].position.table is layers[1].position.table


def test_a_shared_table_is_shared_again_once_it_is_loaded(tmp_path):
    shared = keras_mha.RelativePositionBias()
    inputs = keras.Input((5, WIDTH))
    x = keras_mha.MultiHeadAttention(2, 4, position=shared)(inputs)
    x = keras_mha.MultiHeadAttention(2, 4, position=shared)(x)
    model = keras.Model(inputs, x)
    model.save(tmp_path / "shared.keras")
    loaded = keras.saving.load_model(tmp_path / "shared.keras")
    tables = [layer.position.table for layer in loaded.layers[1:]]
    assert tables[0] is tables[1]
    assert len(loaded.weights) == len(model.weights)
    x = to_tensor(draw(2, 5, WIDTH))
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_a_config_is_plain_data_and_makes_a_position_of_its_own():
    layer = made("relative", (2, 5, WIDTH))
    config = json.loads(json.dumps(layer.get_config()))
    again = keras_mha.MultiHeadAttention.from_config(config)
    assert again.get_config() == layer.get_config()
    assert again.position is not layer.position


@pytest.mark.parametrize("position", KINDS)
def test_positions_along_one_axis_of_several(position):
    """Ids of one batch row stand for all, as those without a batch axis do."""
    x = draw(2, 3, 5, WIDTH)
    layer = keras_mha.MultiHeadAttention(
        2, 4, attention_axes=2, position=position_layer(POSITIONS[position])
    )
    ids = np.array([3, 1, 7, 20, 4])
    found, alike, each = (
        to_numpy(layer(to_tensor(x), position_ids=as_tensor(ids)))
        for ids in (ids, np.tile(ids, (1, 3, 1)), np.tile(ids, (2, 3, 1)))
    )
    plain = keras_mha.MultiHeadAttention(2, 4, position=layer.position)
    plain.build((6, 5, WIDTH))
    plain.set_weights(layer.get_weights())
    rows = to_tensor(x.reshape(6, 5, WIDTH))
    expected = to_numpy(plain(rows, position_ids=as_tensor(ids)))
    for output in (found, alike, each):
        assert_close(output, expected.reshape(x.shape))


def test_position_ids_as_lists():
    x = to_tensor(draw(2, 3, WIDTH))
    layer = made("rotary", x.shape)
    for ids in ([0, 1, 5], [[0, 1, 5], [9, 0, 40]]):
        expected = layer(x, position_ids=as_tensor(np.array(ids)))
        assert_close(to_numpy(layer(x, position_ids=ids)), to_numpy(expected))


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has float64 only when told so")
@pytest.mark.parametrize("position", KINDS)
def test_float64(position):
    x = draw(2, 5, WIDTH)
    layer = made(position, x.shape, dtype="float64")
    output = layer(to_tensor(x, "float64"), use_causal_mask=True)
    assert keras.backend.standardize_dtype(output.dtype) == "float64"
    expected = by_definition(layer, position, x, use_causal_mask=True)[0]
    assert_close(to_numpy(output), expected)


@pytest.mark.parametrize("position", KINDS)
def test_sequences_of_length_0(position):
    layer = made(position, (2, 5, WIDTH))
    assert tuple(layer(to_tensor(draw(2, 0, WIDTH))).shape) == (2, 0, WIDTH)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_half_type_bias_does_not_round_that_of_the_position(implementation):
    query, key, value = (to_tensor(draw(1, 40, 2, 4, seed=seed)) for seed in range(3))
    ids = to_tensor(np.arange(40)[None] * 777, "int32")
    position = keras_mha.ALiBi(2).bias(ids, ids)
    outputs = [
        keras_mha.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            position_bias=position,
            scale=100.0,
            implementation=implementation,
        )
        for bias in (None, to_tensor(np.zeros((1, 2, 40, 40)), "bfloat16"))
    ]
    assert_close(*map(to_numpy, outputs))
