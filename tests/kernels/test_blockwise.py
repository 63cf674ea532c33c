"""The blockwise kernel where it has many tiles, against the float64 definition.

With tiles of 16 the cases below have several rows and columns of tiles, lengths that
are no multiple of a tile, and chunks of heads; `tests/ops` runs the kernel in one tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends, tiling
from tests import oracle
from tests.helpers import (
    backend_jit,
    only_jax,
    only_tensorflow,
    outputs_and_gradients,
    rounded,
    to_numpy,
    to_tensor,
)

XLA = [False, True] if keras.backend.backend() == "tensorflow" else [False]
B, T, S, N, K, H, V = 2, 37, 45, 4, 2, 5, 3
i, j = np.arange(T)[:, None], np.arange(S)
RNG = np.random.default_rng(0)
DENSE = RNG.uniform(size=(B, N, T, S)) < 0.3
VALID = RNG.uniform(size=(B, S)) < 0.6
IDS = np.sort(RNG.integers(0, 4, size=(B, S)))
IDS_MASK = (IDS[:, :T, None] == IDS[:, None, :])[:, None]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tiling, "_MULTIPLE", 4)
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 0)


def draw_arrays(heads=(N, K), **shapes):
    heads, groups = heads
    sizes = {"query": (B, T, heads, H), "key": (B, S, groups, H)}
    sizes |= {"value": (B, S, groups, V)} | shapes
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape) for name, shape in sizes.items()}


class Dilated(masks.Mask):
    """A user's own mask, which says nothing of tiles."""

    def allowed(self, rows, columns):
        return (rows - columns) % 3 == 0


CAUSAL = {"mask": masks.Causal}
# A case: arrays, what the call is given, and the mask's booleans for the definition.
CASES = {
    "plain": ({}, {}, None),
    "causal": ({}, CAUSAL, j <= i),
    "window": (
        {},
        {"mask": lambda: masks.Causal() & masks.SlidingWindow(7)},
        (j <= i) & (i - j < 7),
    ),
    "soft cap": ({}, CAUSAL | {"logit_soft_cap": 1.5}, j <= i),
    "dense": ({}, {"mask": lambda: to_tensor(DENSE)}, DENSE),
    "padding and causal": (
        {},
        {"mask": lambda: masks.Padding(to_tensor(VALID)) & masks.Causal()},
        VALID[:, None, None] & (j <= i),
    ),
    "segments": (
        {},
        {"mask": lambda: masks.Segments(to_tensor(IDS[:, :T]), to_tensor(IDS))},
        IDS_MASK,
    ),
    "an offset a batch row": (
        {},
        {"mask": lambda: masks.Causal(to_tensor(np.array([3, -4], "int32")))},
        j <= i + np.array([3, -4]).reshape(2, 1, 1, 1),
    ),
    "a user's own mask": ({}, {"mask": Dilated}, (i - j) % 3 == 0),
    "sink": ({"sink": (N,)}, {"mask": lambda: masks.Causal(-3)}, j <= i - 3),
    "multi-query": ({"heads": (4, 1)}, CAUSAL, j <= i),
    "odd heads": ({"heads": (3, 3)}, CAUSAL, j <= i),
    **{
        f"bias {shape}": ({"bias": shape}, CAUSAL, j <= i)
        for shape in [
            (B, N, T, S),
            (1, N, T, 1),
            (1, 1, 1, S),
            (B, 1, T, S),
            (1, N, 1, 1),
            (B, 1, 1, 1),
            (T, S),
        ]
    },
}


def check(case, dtype="float32", compile=lambda function: function):
    shapes, given, booleans = case
    arrays = {n: rounded(x, dtype) for n, x in draw_arrays(**shapes).items()}
    cotangent = rounded(RNG.normal(size=(*arrays["query"].shape[:3], V)), dtype)

    def function(*tensors):
        options = {name: x() if callable(x) else x for name, x in given.items()}
        return keras_mha.dot_product_attention(
            **dict(zip(arrays, tensors, strict=True)),
            **options,
            implementation="blockwise",
        )

    (output,), gradients = outputs_and_gradients(
        compile(function), list(arrays.values()), [cotangent], dtype
    )
    everything = arrays | {n: x for n, x in given.items() if n != "mask"}
    everything["mask"] = booleans
    expected, _ = oracle.dot_product_attention(**everything)
    expected_gradients = oracle.dot_product_attention_gradients(
        **everything, output_cotangent=cotangent
    )
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
    for name, found in zip(arrays, gradients, strict=True):
        size = 1 if dtype == "float32" else np.abs(found).max()
        np.testing.assert_allclose(
            found,
            expected_gradients[f"d{name}"],
            rtol=tolerance,
            atol=tolerance * size,
            err_msg=name,
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_many_tiles(case):
    check(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["causal", "sink", f"bias {(B, N, T, S)}"])
def test_many_tiles_in_a_half_type(case, dtype):
    check(CASES[case], dtype)


@pytest.mark.parametrize("xla", XLA)
@pytest.mark.parametrize(
    "case", ["plain", "window", "padding and causal", "sink", f"bias {(B, 1, T, S)}"]
)
def test_many_tiles_compiled(case, xla):
    check(CASES[case], compile=lambda function: backend_jit(function, xla=xla))


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has float64 only when told so"
)
def test_float64_keeps_its_precision():
    arrays = draw_arrays()
    found = keras_mha.dot_product_attention(
        *(to_tensor(x, "float64") for x in arrays.values()), implementation="blockwise"
    )
    expected, _ = oracle.dot_product_attention(**arrays)
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-14)


@only_tensorflow
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_dynamic_batch_and_lengths(window, xla):
    import tensorflow as tf

    mask = masks.Causal()
    if window:
        mask &= masks.SlidingWindow(window)
    heads = ((4, 5), (2, 5), (2, 3))
    signature = [tf.TensorSpec((None, None, *x)) for x in heads]

    @tf.function(jit_compile=xla, input_signature=signature)
    def function(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = keras_mha.dot_product_attention(*tensors, mask=mask, dropout=0.0)
        return output, tape.gradient(output, tensors)

    rng = np.random.default_rng(1)
    for batch, queries, keys in [(2, 37, 45), (1, 16, 16), (3, 50, 20), (2, 1, 18)]:
        sizes = [
            (batch, length, *x)
            for length, x in zip((queries, keys, keys), heads, strict=True)
        ]
        arrays = [rng.normal(size=size) for size in sizes]
        output, gradients = function(*(to_tensor(x) for x in arrays))
        rows, columns = np.arange(queries)[:, None], np.arange(keys)
        booleans = columns <= rows
        if window:
            booleans &= rows - columns < window
        expected, _ = oracle.dot_product_attention(*arrays, mask=booleans)
        np.testing.assert_allclose(to_numpy(output), expected, atol=1e-5)
        expected = oracle.dot_product_attention_gradients(
            *arrays, mask=booleans, output_cotangent=np.ones(output.shape)
        )
        for gradient, theirs in zip(gradients, expected.values(), strict=False):
            np.testing.assert_allclose(to_numpy(gradient), theirs, atol=2e-5)


@only_tensorflow
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_a_dynamic_length_of_zero(queries, keys):
    import tensorflow as tf

    spec = tf.TensorSpec((1, None, 2, 4))

    @tf.function(input_signature=[spec, spec])
    def function(query, key):
        return keras_mha.dot_product_attention(query, key, key, sink=0.0)

    output = function(tf.ones((1, queries, 2, 4)), tf.ones((1, keys, 2, 4)))
    np.testing.assert_array_equal(to_numpy(output), np.zeros((1, queries, 2, 4)))


# ---------------------------------------------------------------- what is not computed

FIRST_32_KEYS = (np.arange(S) < 32) | np.zeros((1, 1, T, 1), "bool")


@pytest.mark.parametrize(
    "mask",
    [
        lambda: masks.Prefix(32),  # says of the tiles that they are empty
        lambda: masks.Padding(to_tensor(FIRST_32_KEYS[0, 0, :1].repeat(B, 0))),
        lambda: to_tensor(FIRST_32_KEYS),
    ],
    ids=["by positions", "by padding", "by booleans"],
)
def test_tiles_in_which_nobody_may_attend_are_not_computed(mask):
    arrays = draw_arrays()
    booleans = np.broadcast_to(FIRST_32_KEYS, (B, N, T, S))
    expected = oracle.dot_product_attention_gradients(
        **arrays, mask=booleans, output_cotangent=np.ones((B, T, N, V))
    )
    for name in ("key", "value"):
        arrays[name][:, 32:] = np.nan  # which 0 times it would hand on

    def function(*tensors):
        return keras_mha.dot_product_attention(
            *tensors, mask=mask(), implementation="blockwise"
        )

    (output,), gradients = outputs_and_gradients(
        function, list(arrays.values()), [np.ones((B, T, N, V))]
    )
    assert np.isfinite(output).all()
    for name, found in zip(arrays, gradients, strict=True):
        np.testing.assert_allclose(found, expected[f"d{name}"], atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "asks"),
    [
        (masks.Causal(), False),
        (masks.Causal() & masks.Where(keras.ops.less_equal), True),
    ],
    ids=["one that says it of every tile", "one that may say too little"],
)
def test_only_where_it_must_turn_out_is_a_tile_asked_for_its_pairs(
    mask, asks, monkeypatch
):
    monkeypatch.setattr(tiling, "TILE", 16)
    asked, either = [], backends.current().either

    def counted(*arguments):
        asked.append(arguments)
        return either(*arguments)

    monkeypatch.setattr(backends.current(), "either", counted)
    x = to_tensor(np.ones((1, 48, 2, 4)))
    keras_mha.dot_product_attention(x, x, x, mask=mask, implementation="blockwise")
    assert bool(asked) == asks


@only_jax
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_grows_with_the_length_and_not_with_its_square(dropout, monkeypatch):
    import jax

    monkeypatch.setattr(tiling, "TILE", 64)

    def loss(x):
        return keras_mha.dot_product_attention(
            x, x, x, mask=masks.Causal(), dropout=dropout, seed=1
        ).sum()

    def extra_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), "float32")
        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert extra_bytes(4096) < 2.2 * extra_bytes(2048)


class SameId(masks.Mask):
    """A user's own mask of data."""

    def __init__(self, ids):
        self.ids = ids

    def block(self, tile):
        rows, columns = tile.cut_rows(self.ids, 0), tile.cut_columns(self.ids, 0)
        return rows[:, None] == columns[None, :]


@only_jax
@pytest.mark.parametrize("wrap", ["grad", "remat", "scan"])
def test_masks_of_traced_data_go_through_the_transformations_of_jax(wrap):
    import jax

    def attend(x, ids, implementation):
        return keras_mha.dot_product_attention(
            x, x, x, mask=SameId(ids), implementation=implementation
        )

    def loss(x, ids, implementation):
        def run(x, ids):
            return attend(x, ids, implementation)

        if wrap == "remat":
            run = jax.checkpoint(run)
        if wrap == "scan":
            stacked = jax.numpy.stack([ids, ids[::-1]])
            x, _ = jax.lax.scan(lambda x, ids: (run(x, ids), None), x, stacked)
            return x.sum()
        return run(x, ids).sum()

    x, ids = to_tensor(RNG.normal(size=(1, 40, 2, 4))), to_tensor(np.arange(40) // 7)
    found, expected = (
        jax.jit(jax.grad(lambda x, ids, name=name: loss(x, ids, name)))(x, ids)
        for name in ("blockwise", "reference")
    )
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-5)


# ----------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_drops_the_weights_that_the_reference_drops(compiled):
    arrays = list(draw_arrays().values())
    cotangent = RNG.normal(size=(B, T, N, V))

    def run(implementation):
        def function(*tensors):
            return keras_mha.dot_product_attention(
                *tensors,
                mask=masks.Causal(),
                dropout=0.4,
                seed=5,
                implementation=implementation,
            )

        return outputs_and_gradients(
            backend_jit(function) if compiled else function, arrays, [cotangent]
        )

    (output,), gradients = run("blockwise")
    (expected,), expected_gradients = run("reference")
    np.testing.assert_allclose(output, expected, atol=1e-5)
    for found, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, theirs, atol=1e-5)


# ---------------------------------------------------------------------------- corners


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bias_and_a_sink_of_another_dtype_are_taken(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only when told so")
    arrays = draw_arrays(bias=(T, S), sink=(N,))
    tensors = {
        name: to_tensor(x, dtype if name in ("bias", "sink") else "float32")
        for name, x in arrays.items()
    }
    found = keras_mha.dot_product_attention(**tensors, implementation="blockwise")
    expected, _ = oracle.dot_product_attention(**arrays)
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-5)


def test_a_batch_of_nobody_gives_nothing():
    query = to_tensor(np.zeros((0, 40, 2, 4)))
    plan = keras_mha.plan_attention(query, query, query, sink=0.0)
    assert plan.implementation == "reference"
    output = keras_mha.dot_product_attention(query, query, query, sink=0.0)
    assert output.shape == (0, 40, 2, 4)


@only_tensorflow
def test_a_dynamic_batch_of_nobody_with_short_sequences(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(backends.current(), "FEW_SCORES", 10_000)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 2, 4))])
    def function(x):
        return keras_mha.dot_product_attention(x, x, x, mask=masks.Causal())

    assert function(tf.zeros((0, 40, 2, 4))).shape == (0, 40, 2, 4)


@only_tensorflow
def test_a_program_has_the_tiles_of_one_turn_of_a_loop_at_a_time():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((1, 64, 4, 4))])
    def gradient(x):
        y = keras_mha.dot_product_attention(x, x, x, implementation="blockwise")
        return tf.gradients(y, x)

    program = gradient.get_concrete_function().graph.as_graph_def()
    functions = [program.node, *(f.node_def for f in program.library.function)]
    loops = [node for nodes in functions for node in nodes if "While" in node.op]
    assert len(loops) >= 6  # chunks, rows and columns, forward and backward
    assert {loop.attr["parallel_iterations"].i for loop in loops} == {1}


@only_tensorflow
def test_an_eager_tape_keeps_no_tiles(monkeypatch):
    import tensorflow as tf

    kept = []
    original = tf.exp

    def exp(x):
        result = original(x)
        kept.append(weakref.ref(result))
        return result

    monkeypatch.setattr(tf, "exp", exp)
    x = to_tensor(RNG.normal(size=(1, 64, 2, 4)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = keras_mha.dot_product_attention(x, x, x, implementation="blockwise")
        assert len(kept) >= 16
        assert not [each for each in kept if each() is not None]
    assert tape.gradient(output, x).shape == x.shape


@only_jax
def test_with_64_bit_numbers_switched_on():
    code = """
import numpy as np, jax, keras_mha
from keras_mha import masks
from keras_mha.kernels import tiling
tiling.TILE = 16
x = np.random.default_rng(0).normal(size=(2, 40, 2, 4))
def loss(x, implementation):
    output = keras_mha.dot_product_attention(
        x, x, x, mask=masks.Causal() & masks.SlidingWindow(9), dropout=0.3, seed=1,
        implementation=implementation,
    )
    return (output * output).sum()
for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-12)):
    found, expected = (
        jax.grad(loss)(x.astype(dtype), name) for name in ("blockwise", "reference")
    )
    assert found.dtype == dtype
    assert abs(found - expected).max() < tolerance, abs(found - expected).max()
"""
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "KERAS_BACKEND": "jax"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
