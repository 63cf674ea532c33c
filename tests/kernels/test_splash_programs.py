"""What programs for TPUs hold, and what splash attention is not given."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.biases import Slopes
from keras_mha.kernels import backends
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.problem import prepared
from keras_mha.kernels.whole import whole
from tests.helpers import only_jax, to_numpy, to_tensor

pytestmark = only_jax
B, T, S, N, K, H, V = 2, 1500, 1600, 8, 2, 64, 80
i, j = np.arange(T)[:, None], np.arange(S)


@pytest.fixture(autouse=True, scope="module")
def known():
    if keras.backend.backend() == "jax":
        from keras_mha.kernels.jax_kernels import splash_kernel

        if not splash_kernel.is_as_known():
            pytest.skip("this version of jax has another splash attention")


# Masks of the valid keys, and of the segments of queries and keys.
MASKS = {
    "none": lambda valid, *ids: None,
    "causal": lambda valid, *ids: masks.Causal(3),
    "window": lambda valid, *ids: masks.Causal() & masks.SlidingWindow(100),
    "padding": lambda valid, *ids: masks.Padding(valid),
    "packed": lambda valid, *ids: (
        masks.Causal() & masks.Segments(*ids) & masks.Padding(valid)
    ),
    "prefix": lambda valid, *ids: masks.Prefix(30) | ~masks.Causal(-1),
    "function of keras.ops": lambda valid, *ids: masks.Where(
        lambda i, j: keras.ops.logical_or(
            keras.ops.equal(keras.ops.mod(i - j, 7), 0), i // 64 == j // 64
        )
    ),
}


def program(make_mask, wanted=(), sink=False, dtype="bfloat16", around=None, **options):
    """Of a call or, if gradients are wanted, its training step, for a TPU."""
    import jax

    from keras_mha.kernels.jax_kernels import splash

    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, V)]
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    inputs += [jax.ShapeDtypeStruct((N,), "float32")] * sink
    marks = [jax.ShapeDtypeStruct((B, S), "bool")]
    marks += [jax.ShapeDtypeStruct((B, n), "int32") for n in (T, S)]

    def attend(inputs, marks):
        query, key, value, *rest = inputs
        call = AttentionCall(
            *(query, key, value, make_mask(*marks)),
            scale=H**-0.5,
            sink=rest[0] if rest else None,
            **options,
        )
        assert splash.refusal(call) is None
        return backends.current().with_gradient(
            splash.forward, splash.backward, whole, *prepared(call)
        )

    def loss(moving, inputs, marks):
        inputs = [*moving, *inputs[len(moving) :]]
        return attend(inputs, marks).astype("float32").sum()

    function = jax.grad(loss) if wanted else lambda _, *given: attend(*given)
    given = [inputs[n] for n in wanted], inputs, marks
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*given)
    return exported.mlir_module()


def shapes_of(text):
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return {tuple(map(int, each.split("x")[:-1])) for each in found}


@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_is_in_the_program_and_no_matrix_of_pairs(name):
    text = program(MASKS[name], wanted=(0, 1, 2))
    assert text.count("@tpu_custom_call") == 3
    assert "dot_general" not in text
    sizes = [np.prod(shape) for shape in shapes_of(text)]
    assert max(sizes) <= B * N * 1600 * 128
    # Keys and values are not repeated for the query heads that share them.
    assert not {shape for shape in shapes_of(text) if shape[:3] == (B, N, 1600)}


def test_the_layer_has_the_kernel_in_mixed_precision():
    import jax

    layer = keras_mha.MultiHeadAttention(
        *(4, 64), sliding_window=300, num_key_value_heads=2, dtype="mixed_bfloat16"
    )
    layer.build((2, 1024, 256))
    weights = [variable.value for variable in layer.trainable_variables]

    def loss(weights, x, mask):
        output, _ = layer.stateless_call(
            *(weights, [], x),
            query_mask=mask,
            value_mask=mask,
            use_causal_mask=True,
            training=True,
        )
        return (output.astype("float32") ** 2).sum()

    inputs = (
        jax.ShapeDtypeStruct((2, 1024, 256), "bfloat16"),
        jax.ShapeDtypeStruct((2, 1024), "bool"),
    )
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])
    text = exported(weights, *inputs).mlir_module()
    assert text.count("@tpu_custom_call") == 3
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and not any(re.search(r": \(.*xf32>", line) for line in products)
    assert not {shape for shape in shapes_of(text) if shape[-2:] == (1024, 1024)}


def test_what_needs_no_gradient_runs_no_kernel_for_it():
    assert program(MASKS["packed"]).count("@tpu_custom_call") == 1
    assert program(MASKS["packed"], wanted=(0,)).count("@tpu_custom_call") == 2


def test_sinks_soft_caps_and_float32_have_the_kernel_too():
    text = program(
        MASKS["causal"], (0, 1, 2, 3), sink=True, dtype="float32", logit_soft_cap=3.0
    )
    assert text.count("@tpu_custom_call") == 3


def of_shape(shape, dtype="float32", **options):
    x = to_tensor(np.zeros(shape), dtype)
    return AttentionCall(x, x, x, **options)


NUMBERS = np.arange(256)
MATRIX = np.ones((256, 256), bool)


class OwnBlocks(masks.Causal):
    """A user's mask, of which nothing is known."""

    def block(self, tile):
        return ~super().block(tile)


REFUSED = {
    "dropout": (lambda: {"dropout": 0.5}, "dropout"),
    "bias": (lambda: {"bias": np.zeros((1, 1, 1, 256))}, "bias"),
    "position bias": (lambda: {"position_bias": Slopes(np.ones(2))}, "bias"),
    "scores": (lambda: {"return_scores": True}, "scores"),
    "sums": (lambda: {"return_lse": True}, "sums"),
    "talking heads": (lambda: {"talking_heads": (np.eye(2), None)}, "heads"),
}
PAIR = "every pair by itself"


class Held:
    """What a user's function finds, though nobody handed it over."""

    number = None


def below_a_tensor():
    Held.number = to_tensor(np.array(7, "int32"))
    return masks.Where(lambda i, j: i < Held.number)


REFUSED_MASKS = {
    "tensor found elsewhere": (below_a_tensor, PAIR),
    "matrix": (lambda: masks.Dense(MATRIX), "all pairs"),
    "user's": (lambda: OwnBlocks(), "OwnBlocks"),
    "padding or causal": (lambda: masks.Padding(MATRIX[:1]) | masks.Causal(), "Or"),
    "not padding": (lambda: ~masks.Padding(MATRIX[:1]), "Not"),
    "offsets": (lambda: masks.Causal(np.array([1])), "Causal"),
    "prefixes": (lambda: masks.Prefix(np.array([1])), "Prefix"),
    "two segments": (
        lambda: masks.Segments(NUMBERS[None]) & masks.Segments(NUMBERS[None]),
        "one kind",
    ),
    "unsigned": (lambda: masks.Segments(NUMBERS[None].astype("uint32")), "int32"),
    "held": (
        lambda: (lambda held: masks.Where(lambda i, j: held[j] < i))(
            to_tensor(NUMBERS)
        ),
        "holds tensors",
    ),
    "table": (lambda: masks.Where(lambda i, j: keras.ops.take(NUMBERS, j) < i), PAIR),
    "tile": (lambda: masks.Where(lambda i, j: i < i[0] + j), PAIR),
    "shape": (
        lambda: masks.Where(lambda i, j: i < keras.ops.ones((8, 1), "int32") + j),
        PAIR,
    ),
    "sorted": (lambda: masks.Where(lambda i, j: keras.ops.sort(j) < i), PAIR),
    "floats": (lambda: masks.Where(lambda i, j: i < 0.5 * j), "whole numbers"),
    "no tensor": (lambda: masks.Where(lambda i, j: True), PAIR),
    "heads": (lambda: masks.Where(lambda i, j: (i < j)[None, None]), PAIR),
    "error": (lambda: masks.Where(lambda i, j: undefined), PAIR),  # noqa: F821
}
REFUSED |= {
    f"mask: {name}": (lambda make=make: {"mask": make()}, clause)
    for name, (make, clause) in REFUSED_MASKS.items()
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name):
    from keras_mha.kernels.jax_kernels import splash

    options, clause = REFUSED[name]
    assert clause in splash.refusal(of_shape((1, 256, 2, 8), **options()))


@pytest.mark.parametrize(
    ("shape", "dtype", "clause"),
    [
        ((1, 256, 2, 8), "float16", "float32 and bfloat16"),
        ((1, 100, 2, 8), "float32", "128"),
        ((1, 256, 2, 300), "float32", "256"),
        ((0, 256, 2, 8), "float32", "no scores"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, dtype, clause):
    from keras_mha.kernels.jax_kernels import splash

    assert clause in splash.refusal(of_shape(shape, dtype))


def test_another_version_of_the_kernel_is_refused(monkeypatch):
    from keras_mha.kernels.jax_kernels import splash, splash_kernel

    call = of_shape((1, 256, 2, 8))
    assert splash.refusal(call) is None
    kernel = splash_kernel._jax_kernel()
    monkeypatch.setattr(kernel, "_splash_attention_bwd_dq", lambda q, k, v: None)
    splash_kernel.is_as_known.cache_clear()
    try:
        assert "another" in splash.refusal(call)
    finally:
        splash_kernel.is_as_known.cache_clear()


# ------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1, 2, 3], [0, 0, 0, 0]],
        [[7, 6, 5, 4], [3, 1, 0, 2]],
        [[-1, -(2**31), 2**31 - 1, 1], [1, 1, 0, 2]],
        [[0], [5]],
    ],
)
def test_unused_numbers_are_not_among_the_others(ids):
    from keras_mha.kernels.jax_kernels import splash_masks

    ids = np.array(ids, "int32")
    found = to_numpy(splash_masks.unused_number(to_tensor(ids)))
    assert found.shape == (2, 1)
    assert not (ids == found).any()


FUNCTIONS = {
    "causal": (masks.Causal(-3), j <= i - 3),
    "window": (masks.Causal() & masks.SlidingWindow(90), (j <= i) & (i - j < 90)),
    "blocks": (masks.Where(lambda i, j: i // 300 == j // 300), i // 300 == j // 300),
    "none": (masks.Where(lambda i, j: i + j < 0), i + j < 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_visits_are_of_the_blocks_that_hold_allowed_pairs(name):
    from keras_mha.kernels.jax_kernels import splash_blocks, splash_masks
    from keras_mha.kernels.jax_kernels.layout import multiple

    mask, booleans = FUNCTIONS[name]
    cut = splash_blocks.Blocks(128, 256)
    shape = [multiple(size, n) for n, size in zip((T, S), cut, strict=True)]
    padded = np.zeros(shape, bool)
    padded[:T, :S] = booleans
    wanted = padded.reshape(shape[0] // 128, 128, -1, 256).any((1, 3))

    function = splash_masks.positions(splash_masks.split(mask), S)
    visits = splash_blocks.visits(function, T, S, cut)
    backward = [table.transpose(0, 2, 1) for table in visits.backward]
    for tables, seen in ((visits.forward, wanted), (backward, wanted.T)):
        runs, numbers = (table[0] for table in tables)
        assert runs.shape[1] == max(seen.sum(1).max(), 1)
        for row, each in enumerate(seen):
            found = numbers[row][runs[row] > 0]
            assert found.tolist() == np.nonzero(each)[0].tolist()


def test_no_pairs_are_worked_out_for_masks_that_know_their_tiles(monkeypatch):
    from keras_mha.kernels.jax_kernels import splash_blocks, splash_masks

    monkeypatch.setattr(splash_blocks, "_any_seen", None)
    mask = masks.Causal() & masks.SlidingWindow(4096)
    function = splash_masks.positions(splash_masks.split(mask))
    cut = splash_blocks.blocks(32768, 32768, 64)
    visits = splash_blocks.visits(function, 32768, 32768, cut)
    assert visits.forward[0].shape == (1, 64, 9)


def test_padding_and_segments_become_one_number_a_token():
    from keras_mha.kernels.jax_kernels import splash_masks

    rng = np.random.default_rng(0)
    queries, keys = (rng.integers(-2, 3, (2, n)).astype("int32") for n in (9, 11))
    valid, sees = (rng.uniform(size=(2, n)) < 0.6 for n in (11, 9))
    mask = masks.Padding(to_tensor(valid)) & masks.Dense(to_tensor(sees[:, :, None]))
    for segments in (None, masks.Segments(to_tensor(queries), to_tensor(keys))):
        found = splash_masks.split(mask if segments is None else mask & segments)
        ids = splash_masks.segment_ids(found, 2, 9, 11)
        of_queries, of_keys = map(to_numpy, ids)
        allowed = valid[:, None, :] & sees[:, :, None]
        if segments is not None:
            allowed &= queries[:, :, None] == keys[:, None, :]
        assert ((of_queries[:, :, None] == of_keys[:, None, :]) == allowed).all()
