"""Positions over several axes in `keras_mha.MultiHeadAttention`.

Against the float64 definition on rows of tokens with their coordinates, into which the
tests fold images and video by themselves.
"""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mha
from tests import oracle
from tests.helpers import (
    backend_jit,
    outputs_and_gradients,
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
)
from tests.layers.test_multi_head_attention_positions import (
    all_variables_of,
    position_layer,
    weights_of,
)

BACKEND = keras.backend.backend()
WIDTH, KEY_DIM = 6, 12
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 3}

# As the definition has them, for 2 axes and for 3.
POSITIONS: dict[str, list[dict[str, Any]]] = {
    "rotary": [{"kind": "rotary", "axes": n} for n in (2, 3)],
    "rotary, sections": [
        {"kind": "rotary", "axes": 2, "sections": (4, 2), "interleaved": True},
        {
            "kind": "rotary",
            "axes": 3,
            "sections": (3, 1, 2),
            "shared_frequencies": True,
        },
    ],
    "rotary, dynamic": [
        {"kind": "rotary", "axes": n, "scaling": DYNAMIC} for n in (2, 3)
    ],
    "mixed rotary": [{"kind": "mixed rotary", "axes": n} for n in (2, 3)],
    "alibi": [{"kind": "alibi", "axes": n} for n in (2, 3)],
    "alibi, euclidean": [
        {"kind": "alibi", "axes": n, "distance": "euclidean"} for n in (2, 3)
    ],
    "window": [{"kind": "relative", "window": sizes} for sizes in [(4, 5), (3, 4, 5)]],
}
KINDS = ["rotary", "mixed rotary", "alibi", "window"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def config_of(position: str, axes: int) -> dict[str, Any]:
    return POSITIONS[position][axes - 2]


def made(config: dict[str, Any], *shapes: tuple[int, ...], **options: Any) -> Any:
    """A built layer with numbers of its own in every weight."""
    layer = keras_mha.MultiHeadAttention(
        **{"num_heads": 2, "key_dim": KEY_DIM, **options},
        position=position_layer(config),
        **QUICK,
    )
    layer.build(*(shapes if len(shapes) > 1 else shapes * 2))
    randomize(layer)
    return layer


# ----------------------------------------------------- folding, as the definition sees


def as_rows(x: np.ndarray, attended: tuple[int, ...]) -> np.ndarray:
    """(B, *positions, D) as (B', T, D): a row for each place along the other axes."""
    others = [axis for axis in range(x.ndim - 1) if axis not in attended]
    x = np.transpose(x, (*others, *attended, x.ndim - 1))
    length = int(np.prod([x.shape[len(others) + i] for i in range(len(attended))]))
    return x.reshape(-1, length, x.shape[-1])


def from_rows(rows: np.ndarray, like: np.ndarray, attended: tuple[int, ...]):
    """The way back from `as_rows`."""
    others = [axis for axis in range(like.ndim - 1) if axis not in attended]
    order = (*others, *attended)
    x = rows.reshape(*(like.shape[axis] for axis in order), rows.shape[-1])
    return np.transpose(x, (*np.argsort(order), like.ndim - 1))


def by_definition(layer, config, attended, *inputs, weights=None, **arguments):
    """Output and scores of grids, whose points stand at their own indices."""
    rows = [as_rows(x, attended) for x in inputs]
    ids = tuple(
        oracle.grid(*(x.shape[axis] for axis in attended))
        for x in (inputs[0], inputs[-1])
    )
    weights = weights_of(layer) if weights is None else weights
    output, scores = oracle.multi_head_attention(
        weights, {"position": config}, *rows, position_ids=ids, **arguments
    )
    return from_rows(output, inputs[0], attended), scores


# ---------------------------------------------------------------------------- on grids

LAYOUTS = {
    "images": ((2, 3, 4, WIDTH), None),
    "images, columns first": ((2, 3, 4, WIDTH), (2, 1)),
    "frames of video": ((2, 2, 3, 2, WIDTH), (2, 3)),
    "rows over time": ((1, 3, 2, 4, WIDTH), (3, -4)),
    "video": ((1, 2, 3, 2, WIDTH), None),
    "video, in any order": ((1, 2, 3, 2, WIDTH), (3, 1, 2)),
}


def attended_axes(shape, axes) -> tuple[int, ...]:
    rank = len(shape)
    axes = range(1, rank - 1) if axes is None else axes
    return tuple(axis % rank for axis in axes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_grids(position, layout):
    shape, axes = LAYOUTS[layout]
    attended = attended_axes(shape, axes)
    config, x = config_of(position, len(attended)), draw(*shape)
    layer = made(config, shape, attention_axes=axes)
    output, scores = run(lambda x: layer(x, return_attention_scores=True), x)
    expected, expected_scores = by_definition(layer, config, attended, x)
    assert_close(output, expected)
    assert_close(scores.reshape(expected_scores.shape), expected_scores)


@pytest.mark.parametrize("position", POSITIONS)
def test_grids_of_grouped_heads(position):
    config, x = config_of(position, 2), draw(2, 2, 3, WIDTH)
    layer = made(config, x.shape, num_heads=4, num_key_value_heads=2)
    (found,) = run(lambda x: layer(x), x)
    assert_close(found, by_definition(layer, config, (1, 2), x)[0])


CALLS = {
    "position": st.sampled_from(list(POSITIONS)),
    "attended": st.sampled_from([(1, 2), (2, 1), (1, 2, 3), (3, 1, 2)]),
    "cross": st.booleans(),
    "heads": st.sampled_from([(1, None), (4, 2)]),
    "path": st.sampled_from([None, False, True]),
    "causal": st.booleans(),
    "segments": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=settings().max_examples // (4 if BACKEND == "jax" else 2))
@given(call=st.fixed_dictionaries(CALLS))
def test_any_grid_in_any_call(call):
    """Output, and the gradients of the inputs and of every weight."""
    rng, attended = np.random.default_rng(call["seed"]), call["attended"]
    sizes = {1: (2, 3), 2: (3, 2), 3: (2, 2)}
    shapes = [
        (2, *(sizes[axis][side] for axis in sorted(attended)), WIDTH) for side in (0, 1)
    ]
    inputs = [rng.normal(size=shape) for shape in shapes[: 1 + call["cross"]]]
    config = config_of(call["position"], len(attended))
    num_heads, groups = call["heads"]
    layer = made(
        config,
        *(x.shape for x in inputs),
        num_heads=num_heads,
        num_key_value_heads=groups,
        attention_axes=attended,
        flash_attention=call["path"],
        # A number added to all scores of a row changes nothing, so that of a key's bias
        # that is not rotated the gradient would be what rounding leaves of zero.
        use_bias="rotary" in call["position"],
    )
    arguments: dict[str, Any] = {"use_causal_mask": call["causal"]}
    segments = [rng.integers(0, 2, size=x.shape[:-1]) for x in inputs]
    variables = all_variables_of(layer)
    weights = weights_of(layer)

    def ours(*tensors):
        given = {"segment_ids": as_tensor(pair(segments))} if call["segments"] else {}
        return layer(*tensors, **given, **arguments)

    def definition(arrays):
        given = {}
        if call["segments"]:
            rows = [as_rows(ids[..., None], attended)[..., 0] for ids in segments]
            given["segment_ids"] = pair(rows)
        xs = arrays[: len(inputs)]
        found = dict(zip(weights, arrays[len(inputs) :], strict=True))
        return by_definition(
            layer, config, attended, *xs, weights=found, **given, **arguments
        )[0]

    arrays = [*inputs, *weights.values()]
    cotangent = rng.normal(size=inputs[0].shape)
    (found,), gradients = outputs_and_gradients(
        with_variables(ours, list(variables.values())), arrays, [cotangent]
    )
    assert_close(found, definition(arrays))
    names = ["query", "value"][: len(inputs)] + list(weights)
    for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        assert_derivative(
            gradient,
            lambda x, i=i: (
                definition([*arrays[:i], x, *arrays[i + 1 :]]) * cotangent
            ).sum(),
            arrays[i],
            rng.normal(size=arrays[i].shape),
            name,
        )


def pair(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return arrays[0], arrays[-1]


# -------------------------------------------------------- patches in one row, by ids


@pytest.mark.parametrize("position", POSITIONS)
def test_flattened_images_of_different_sizes_share_a_batch(position):
    """A class token at a place of its own, patches of 2x3 and 3x2, and padding."""
    config = config_of(position, 2)
    grids = [oracle.grid(2, 3) + 1, np.vstack([oracle.grid(2, 2) + 1, [[0, 0]] * 2])]
    ids = np.stack([np.vstack([[[0, 0]], grid]) for grid in grids])
    valid = np.array([[True] * 7, [True] * 5 + [False] * 2])
    x = draw(2, 7, WIDTH)
    layer = made(config, x.shape)
    arguments = {"position_ids": ids, "value_mask": valid}
    tensors = {name: as_tensor(value) for name, value in arguments.items()}
    (found,) = run(lambda x: layer(x, x, **tensors), x)
    expected, _ = oracle.multi_head_attention(
        weights_of(layer), {"position": config}, x, **arguments
    )
    assert_close(found, expected)


@pytest.mark.parametrize("position", KINDS)
def test_flattened_patches_are_as_the_grid_is(position):
    x = draw(2, 3, 4, WIDTH)
    config = config_of(position, 2)
    grid = made(config, x.shape)
    row = made(config, (2, 12, WIDTH))
    ids = oracle.grid(3, 4)
    expected, one, each = run(
        lambda x: (
            grid(x),
            *(
                row(
                    keras.ops.reshape(x, (2, 12, WIDTH)),
                    position_ids=as_tensor(each),
                )
                for each in (ids, np.stack([ids, ids]))
            ),
        ),
        x,
    )
    assert_close(one.reshape(expected.shape), expected)
    assert_close(each.reshape(expected.shape), expected)


@pytest.mark.parametrize("position", KINDS)
@pytest.mark.parametrize("attended", [(1, 2), (2, 1)])
def test_ids_on_a_grid(position, attended):
    """For all images, for each, and as a pair, with the numbers of the definition."""
    x, rng = draw(2, 2, 3, WIDTH), np.random.default_rng(0)
    config = config_of(position, 2)
    layer = made(config, x.shape, attention_axes=attended)
    for shape in [(2, 3, 2), (1, 2, 3, 2), (2, 2, 3, 2)]:
        ids = rng.integers(0, 4, size=shape)
        one, both = run(
            lambda x, ids=ids: (
                layer(x, position_ids=as_tensor(ids)),
                layer(x, x, position_ids=as_tensor((ids, ids))),
            ),
            x,
        )
        rows = as_rows(np.broadcast_to(ids, (2, 2, 3, 2)), attended)
        expected, _ = oracle.multi_head_attention(
            weights_of(layer),
            {"position": config},
            as_rows(x, attended),
            position_ids=rows,
        )
        expected = from_rows(expected, x, attended)
        assert_close(one, expected)
        assert_close(both, expected)


@pytest.mark.parametrize("position", KINDS)
def test_more_coordinates_than_attended_axes(position):
    """Of frames of flattened patches, each token has a time, a row and a column."""
    x, config = draw(2, 2, 4, WIDTH), config_of(position, 3)
    layer = made(config, x.shape)
    ids = oracle.grid(2, 2, 2).reshape(2, 4, 3)
    (found,) = run(lambda x: layer(x, position_ids=as_tensor(ids)), x)
    expected, _ = by_definition(layer, config, (1, 2, 3), x.reshape(2, 2, 2, 2, WIDTH))
    assert_close(found, expected.reshape(x.shape))


@pytest.mark.parametrize("position", KINDS)
def test_differences_of_coordinates_matter_and_nothing_else(position):
    x, config = draw(1, 2, 3, WIDTH), config_of(position, 2)
    layer = made(config, x.shape)
    ids = oracle.grid(2, 3).reshape(2, 3, 2)

    def call(x):
        moved, spread = ids + [500, 70], ids * [1, 2]
        return (
            layer(x),
            layer(x, position_ids=as_tensor(moved)),
            layer(x, position_ids=as_tensor(spread)),
        )

    counted, shifted, spread = run(call, x)
    assert_close(shifted, counted)
    assert np.abs(spread - counted).max() > 1e-3


# --------------------------------------------------------------------------- many tiles


@pytest.mark.parametrize("position", KINDS)
def test_long_grids(position):
    # 24 * 25 points are more than a tile of 512 rows, and no multiple of one.
    x, config = draw(1, 24, 25, WIDTH), config_of(position, 2)
    if position == "window":
        config = {**config, "window": (24, 25)}
    layer = made(config, x.shape, flash_attention=True)
    (found,) = run(lambda x: layer(x), x)
    assert_close(found, by_definition(layer, config, (1, 2), x)[0])


# --------------------------------------------------------------------------- as a layer


@pytest.mark.parametrize("position", POSITIONS)
def test_config_comes_back(position):
    config = config_of(position, 2)
    layer = keras_mha.MultiHeadAttention(
        2, KEY_DIM, attention_axes=(2, 1), position=position_layer(config)
    )
    plain = json.loads(json.dumps(layer.get_config()))
    revived = keras_mha.MultiHeadAttention.from_config(plain)
    assert json.loads(json.dumps(revived.get_config())) == plain
    assert revived.position.axes == 2


@pytest.mark.parametrize("position", KINDS)
def test_model_of_any_size_is_saved(position, tmp_path):
    config = config_of(position, 2)
    x = keras.Input((None, None, WIDTH))
    ids = keras.Input((None, None, 2), dtype="int32")
    layer = keras_mha.MultiHeadAttention(
        2, KEY_DIM, name="attention", position=position_layer(config)
    )
    model = keras.Model([x, ids], layer(layer(x), position_ids=ids))
    randomize(layer)
    model.save(tmp_path / "model.keras")
    revived = keras.saving.load_model(tmp_path / "model.keras")
    layer = revived.get_layer("attention")
    for sizes in [(2, 3), (3, 2)]:
        x = draw(2, *sizes, WIDTH)
        ids = np.tile(oracle.grid(*sizes).reshape(1, *sizes, 2) + 5, (2, 1, 1, 1))
        (found,) = run(lambda *x: revived(list(x)), x, ids.astype("int32"))
        once, _ = by_definition(layer, config, (1, 2), x)
        expected, _ = by_definition(layer, config, (1, 2), once)
        size = np.abs(expected).max()
        assert_close(found / size, expected / size)


@pytest.mark.parametrize("position", KINDS)
def test_compiled(position):
    x, y = draw(2, 2, 3, WIDTH), draw(2, 3, 2, WIDTH)
    config = config_of(position, 2)
    layer = made(config, x.shape, y.shape)
    compiled = backend_jit(lambda x, y: layer(x, y), xla=True)
    found = to_numpy(compiled(to_tensor(x), to_tensor(y)))
    assert_close(found, by_definition(layer, config, (1, 2), x, y)[0])


@pytest.mark.parametrize("position", KINDS)
def test_mixed_precision_far_from_zero(position):
    x, config = draw(2, 2, 3, WIDTH), config_of(position, 2)
    layer = made(config, x.shape, dtype="mixed_bfloat16")
    ids = oracle.grid(2, 3).reshape(2, 3, 2) + [100_003, 7_777]
    (found,) = run(lambda x: layer(x, position_ids=as_tensor(ids)), x)
    expected, _ = by_definition(layer, config, (1, 2), x)
    size = np.abs(expected).max()
    assert_close(found / size, expected / size, tolerance=3e-2)


@pytest.mark.parametrize("position", KINDS)
def test_grids_without_points(position):
    layer = made(config_of(position, 2), (2, 2, 3, WIDTH))
    assert tuple(layer(to_tensor(draw(2, 0, 3, WIDTH))).shape) == (2, 0, 3, WIDTH)


# ------------------------------------------------------------------------- the biases


def test_gradients_of_a_windows_table_over_many_tiles():
    """Tile by tile the same as at once; that of small grids is by definition above."""
    x, window = draw(1, 24, 25, WIDTH), (24, 25)
    cotangent, found = draw(*x.shape, seed=1), {}
    for flash_attention in (True, False):
        layer = made(
            {"kind": "relative", "window": window},
            x.shape,
            flash_attention=flash_attention,
            use_bias=False,
        )
        variables = all_variables_of(layer)
        found[flash_attention] = outputs_and_gradients(
            with_variables(layer, list(variables.values())),
            [x, *weights_of(layer).values()],
            [cotangent],
        )
    (output,), gradients = found[True]
    (expected,), expected_gradients = found[False]
    assert_close(output, expected)
    for name, one, other in zip(
        ["query", *variables], gradients, expected_gradients, strict=True
    ):
        size = max(1.0, np.abs(other).max())
        assert_close(one / size, other / size, name)


def test_a_row_that_is_a_whole_window_is_counted_in_it():
    config, x = {"kind": "relative", "window": (3, 4)}, draw(2, 3, 4, WIDTH)
    grid, row = made(config, x.shape), made(config, (2, 12, WIDTH))
    expected, found = run(
        lambda x: (grid(x), row(keras.ops.reshape(x, (2, 12, WIDTH)))), x
    )
    assert_close(found.reshape(expected.shape), expected)


def test_beyond_the_window_the_farthest_distance_counts():
    config = {"kind": "relative", "window": (2, 3)}
    x, ids = draw(1, 4, WIDTH), np.array([[0, 0], [0, 9], [7, 0], [1, 2]])
    layer = made(config, x.shape)
    (found,) = run(lambda x: layer(x, position_ids=as_tensor(ids)), x)
    (near,) = run(
        lambda x: layer(x, position_ids=as_tensor(np.minimum(ids, [1, 2]))), x
    )
    expected, _ = oracle.multi_head_attention(
        weights_of(layer), {"position": config}, x, position_ids=ids
    )
    assert_close(found, expected)
    assert np.abs(found - near).max() > 1e-3  # not the token's own place


def test_layers_share_a_windows_table():
    position = keras_mha.RelativePositionBias(window=(2, 3))
    x = keras.Input((2, 3, WIDTH))
    y = x
    for _ in range(2):
        y = keras_mha.MultiHeadAttention(2, 4, position=position, use_bias=False)(y)
    model = keras.models.clone_model(keras.Model(x, y))
    assert len(model.weights) == 4 + 4 + 1
    assert tuple(model.layers[1].position.table.shape) == (15, 2)
    assert model.layers[1].position is model.layers[2].position


def test_training_moves_a_windows_table():
    position = keras_mha.RelativePositionBias(window=(2, 2), initializer="zeros")
    x = keras.Input((2, 2, WIDTH))
    layer = keras_mha.MultiHeadAttention(2, 4, position=position)
    model = keras.Model(x, layer(x))
    randomize(layer)
    before = to_numpy(position.table.value)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.fit(draw(4, 2, 2, WIDTH), draw(4, 2, 2, WIDTH, seed=1), verbose=0)
    assert (np.abs(to_numpy(position.table.value) - before) > 0).all()


@pytest.mark.parametrize("kind", ["alibi", "window"])
def test_bias_layers_by_themselves(kind):
    """Called on coordinates, of either side a row for each batch or one for all."""
    rng = np.random.default_rng(0)
    table = draw(4 * 2 * 2 - 1, 3)
    for query_rows, key_rows in [(False, None), (True, False), (False, True)]:
        sides = [rng.integers(0, 5, size=(2, 4, 2) if query_rows else (4, 2))]
        if key_rows is not None:
            sides.append(rng.integers(0, 5, size=(2, 3, 2) if key_rows else (3, 2)))
        if kind == "alibi":
            layer = keras_mha.ALiBi(3, axes=2, distance="euclidean")
            slopes = oracle.alibi_slopes(3)
            expected = oracle.grid_alibi_bias(slopes, sides[0], sides[-1], "euclidean")
        else:
            layer = keras_mha.RelativePositionBias(3, window=(3, 2))
            layer.build()
            layer.table.assign(table.astype("float32"))
            expected = oracle.window_bias(table, sides[0], sides[-1], (3, 2))
        given = [to_tensor(ids, "int32") for ids in sides]
        found = layer(*given)
        assert tuple(found.shape) == expected.shape
        assert_close(to_numpy(found), expected)
        symbolic = layer.compute_output_spec(*given)
        assert tuple(symbolic.shape) == expected.shape


def test_bias_objects_take_coordinates():
    query, key, value = (draw(2, n, 2, 4, seed=n) for n in (6, 4, 4))
    ids = oracle.grid(2, 3)[None], oracle.grid(2, 2)[None]
    bias = oracle.grid_alibi_bias(oracle.alibi_slopes(2), *ids)
    expected, _ = oracle.dot_product_attention(query, key, value, bias=bias)
    for implementation in ("reference", "blockwise"):
        found = keras_mha.dot_product_attention(
            *(to_tensor(x) for x in (query, key, value)),
            position_bias=keras_mha.ALiBi(2, axes=2).bias(*map(as_tensor, ids)),
            implementation=implementation,
        )
        assert_close(to_numpy(found), expected)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: keras_mha.ALiBi(4), {"axes", "distance"}),
        (keras_mha.RelativePositionBias, {"window"}),
    ],
)
def test_configs_of_one_axis_are_those_of_before_there_were_several(make, names):
    assert not set(make().get_config()) & names
