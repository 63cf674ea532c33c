"""Loops, tiles and gradients on TensorFlow: Python's eagerly, `tf.while_loop` else."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from keras_mha._lengths import shape_of
from keras_mha.kernels.backends.tensorflow_differentiable import (
    in_forward_mode,
    pulled_back,
    unrecorded,
    with_derivatives_of,
)
from keras_mha.kernels.backends.tensorflow_recomputing import drawn
from keras_mha.kernels.backends.tensorflow_repeated import repeated
from keras_mha.kernels.few_scores import FewScores

__all__ = ["drawn"]  # beside what is defined here

# Whether programs are lowered later, and perhaps for another kind of device.
LOWERS_LATER = False

# How many heads share a tile on a CPU, and rows and columns of one at most, measured:
# tiles of 1024 take 0.7 to 0.9 of the time of such of 512, with two heads each.
HEADS_PER_TILE = 1
LARGEST_TILE = 1024

# Where products take and give the features of rows, as an axis of `(*lead, G, rows)`
# with them.
FEATURES_OF_ROWS = 2

# From how many scores a head tiles are faster than whole scores on a CPU, measured: for
# each kind of call (`thresholds.kind_of`) 1024 x 1024 of a sequence or a few, 768 x 768
# of a batch of 8.
FEW_SCORES = FewScores(in_all=64 * 704**2, least=640**2, most=1024**2)

# Up to how many tokens `_key_dot_query` is better than `einsum` on a CPU, in a graph: a
# training step of one sequence takes 0.7 to 0.9 of the time, one of 128 tokens 1.04.
_SHORT = 32

# From how many numbers on `as_one_program` has XLA compile one, which takes about 0.1 s
# once: it then goes over them once, and takes a quarter of the time.
_MANY_NUMBERS = 2**18


def as_written(function: Callable) -> Callable:
    """Returns the function, which no compiler is to translate from its source."""
    return tf.autograph.experimental.do_not_convert(function)


def loop(
    count: Any, body: Callable, carry: tuple, goes_on: Callable | None = None
) -> tuple:
    """Returns the carry after `carry = body(i, carry)` for `i` in `0 ... count - 1`, up
    to the first of which `goes_on(i, carry)` says no."""
    if tf.executing_eagerly() or (isinstance(count, int) and count <= 1):
        for index in range(int(count)):
            if goes_on is not None and not goes_on(index, carry):
                break
            carry = body(index, carry)
        return carry

    def is_next(index, carry):
        is_one = index < count
        return is_one if goes_on is None else is_one & goes_on(index, carry)

    return tf.while_loop(
        is_next,
        lambda index, carry: (index + 1, body(index, carry)),
        (tf.constant(0), carry),
        # Of turns that run at once each would hold tiles of its own.
        parallel_iterations=1,
    )[1]


def either(condition: Any, yes: Callable, no: Callable) -> Any:
    """Runs one of two functions without arguments, by a boolean worked out now."""
    return tf.cond(condition, yes, no)


def table(numbers: Any) -> Any:
    """Returns an array of integers that a loop's index may index."""
    return numbers if tf.executing_eagerly() else tf.constant(numbers)


def new_tiles(count: Any, shape: tuple, dtype: str, like: Any) -> Any:
    """Returns `count` tiles of zeros."""
    if not isinstance(count, int):
        count = tf.maximum(count, 1)  # no tile would have no shape; see `stacked`
    zeros = tf.zeros((count, *shape), dtype)
    # An array's elements are written in place; a tensor would be copied each time.
    tiles = tf.TensorArray(
        dtype, count, element_shape=zeros.shape[1:], clear_after_read=False
    )
    return tiles.unstack(zeros)


def put_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with one of them written."""
    return tiles.write(index, tile)


def add_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with something added to one of them."""
    return tiles.write(index, tiles.read(index) + tile)


def stacked(tiles: Any, count: Any) -> Any:
    """Returns all tiles as one tensor, `(count, *shape)`."""
    tiles = tiles.stack()
    return tiles if isinstance(count, int) else tiles[:count]


def scores(x: Any, y: Any) -> Any:
    """Of rows `(*lead, width, G, rows)` and columns `(*lead, width, columns)` returns
    their products, `(*lead, G, rows, columns)`."""
    products = _product(_flat_rows(x, 3), y, transpose_a=True)
    return _apart(products, 2, shape_of(x)[3:])


def to_rows(weights: Any, y: Any) -> Any:
    """Returns for rows what columns `(*lead, width, columns)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, width, G, rows)`."""
    # Faster by half than the product that gives the transpose at once.
    sums = _product(_flat_rows(weights, 2), y, transpose_b=True)
    return _apart(tf.linalg.matrix_transpose(sums), 3, shape_of(weights)[2:4])


def to_columns(weights: Any, x: Any) -> Any:
    """Returns for columns what rows `(*lead, width, G, rows)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, width, columns)`."""
    return _product(_flat_rows(x, 3), _flat_rows(weights, 2))


def _product(x, y, **transposed):
    """Multiplies in the half type if one of the two is of one."""
    half = next((z.dtype for z in (x, y) if z.dtype.size == 2), None)
    if half is None:
        return tf.matmul(x, y, **transposed)
    # Added up in float32, but what is returned is rounded to the half type: for GPUs
    # TensorFlow has no product of half types that is not.
    product = tf.matmul(tf.cast(x, half), tf.cast(y, half), **transposed)
    return tf.cast(product, "float32")


def _flat_rows(x: Any, axis: int) -> Any:
    """Folds `G` and rows into one axis, as products take them."""
    shape = shape_of(x)
    rows = shape[axis] * shape[axis + 1]
    return ops.reshape(x, (*shape[:axis], rows, *shape[axis + 2 :]))


def _apart(x: Any, axis: int, lengths: tuple) -> Any:
    """The way back from `_flat_rows`."""
    shape = shape_of(x)
    return ops.reshape(x, (*shape[:axis], *lengths, *shape[axis + 1 :]))


def product(equation: str, x: Any, y: Any) -> Any:
    """Returns `einsum` of two tensors of one dtype, of half types in float32 (where
    each number was rounded to the half type)."""
    is_short = equation == "btnh,bsnh->bnts" and _are_short(x, y)
    products = _key_dot_query(y, x) if is_short else ops.einsum(equation, x, y)
    return ops.cast(products, "float32") if x.dtype.size == 2 else products


def _are_short(query, key):
    """Whether sequences are so short that `_key_dot_query` is better."""
    rows, columns, width = query.shape[1], key.shape[1], query.shape[3]
    is_known = None not in (rows, columns, width)
    if tf.executing_eagerly() or not is_known or device_kind(query) != "cpu":
        return False
    # Its scores, which are transposed, are then no more than the keys' numbers.
    return max(rows, columns) <= min(_SHORT, width)


def _key_dot_query(key, query):
    """Returns `(B, S, N, H), (B, T, N, H) -> (B, N, T, S)`.

    `einsum` would bring the key into the order `(B, N, H, S)`, which takes longer.
    """
    key, query = (tf.transpose(x, (0, 2, 1, 3)) for x in (key, query))
    return tf.transpose(tf.matmul(key, query, transpose_b=True), (0, 1, 3, 2))


def is_computed_now(x: Any) -> bool:
    """Whether operations on a tensor run as Python comes to them."""
    return tf.executing_eagerly()


def is_better_multiplied(x: Any) -> bool:
    """Whether `multiplied` is better than a call of the layer that does the same."""
    # In graphs too: `tf.einsum` multiplies each short sequence of a batch alone, which
    # takes up to twice as long as all at once, and in training more than four times.
    return True


def is_called_plainly(layer: Any) -> bool:
    """Whether nobody watches, or changes, the calls of a layer."""
    return True  # with torch's modules some can


def multiplied(x: Any, kernel: Any, bias: Any, axes: int) -> Any:
    """Returns `x . kernel + bias`, a sum over the last `axes` axes of `x`."""
    shape = (*shape_of(x)[: len(x.shape) - axes], *kernel.shape[axes:])
    width, out = math.prod(kernel.shape[:axes]), math.prod(kernel.shape[axes:])
    y = tf.matmul(_reshaped(x, (-1, width)), _reshaped(kernel, (width, out)))
    if bias is not None:
        y = tf.nn.bias_add(y, _reshaped(bias, (-1,)))
    return _reshaped(y, shape)


def _reshaped(x, shape):
    if not tf.executing_eagerly():
        return tf.reshape(x, shape)
    # Ten times as fast as with a variable, or with a shape that is no tensor yet.
    return tf.reshape(tf.convert_to_tensor(x), _shape_tensor(shape))


@functools.lru_cache(maxsize=1024)
def _shape_tensor(shape):
    with tf.init_scope(), tf.device("CPU"):
        return tf.constant(shape, "int32")


def row_max(x: Any) -> Any:
    """Returns the largest number along the last axis."""
    return tf.reduce_max(x, -1)


def exp_minus(x: Any, rows: Any) -> Any:
    """Returns `exp(x - rows)` with one number a row; `x` may be written over."""
    # LiteRT has no `rows[..., None]` of lengths that are not known yet.
    return tf.exp(x - tf.expand_dims(rows, -1))


def xor_shifted_times(x: Any, bits: int, factor: int) -> Any:
    """Returns `(x ^ (x >> bits)) * factor` of int32, with the sign shifted in and the
    product cut to 32 bits; `x` may be written over."""
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, bits)) * factor


def is_better_as_program() -> bool:
    """Whether operations are run one by one, and would be faster as one program."""
    return False


def as_one_program(function: Callable, tensors: tuple, option: Any) -> Any:
    """Returns `function(option, *tensors)`, where it is better run as one program."""
    if _are_many(tensors) and device_kind(tensors[0]) == "cpu":
        kinds = tuple(tf.TensorSpec(x.shape, x.dtype) for x in tensors)
        return _compiled(function, option, kinds)(*tensors)
    return function(option, *tensors)


def _are_many(tensors):
    """Whether tensors after the first make many numbers together, known beforehand:
    else a program would be compiled for each length."""
    shapes = [x.shape for x in tensors[1:]]
    if not all(shape.is_fully_defined() for shape in shapes):
        return False
    together = functools.reduce(tf.broadcast_static_shape, shapes)
    return together.num_elements() >= _MANY_NUMBERS


@functools.lru_cache(maxsize=64)
def _compiled(function, option, kinds):
    program = functools.partial(function, option)
    program = tf.function(program, jit_compile=True, autograph=False)
    return program.get_concrete_function(*kinds)  # which warns of no other shape


def at_least(numbers: Any, threshold: int) -> Any:
    """Returns which int32 are not below a threshold, as `keep` takes it."""
    return numbers >= threshold


def keep(x: Any, kept: Any) -> Any:
    """Returns `x` with zeros where `at_least` said no."""
    return tf.where(kept, x, tf.zeros((), x.dtype))


def is_length(x: Any) -> bool:
    """Whether loops can run over an axis of this length."""
    return True


@functools.cache
def _fastest_device() -> str:
    for kind in ("TPU", "GPU"):
        if tf.config.list_logical_devices(kind):
            return kind.lower()
    return "cpu"


def device_kind(x: Any) -> str:
    """Returns the kind of device that computes with `x`; see `kernels.call`."""
    return _fastest_device()


@functools.cache
def device_memory() -> int | None:
    """Returns how many bytes the fastest device has, `None` if it does not say."""
    # Only what TensorFlow was told it says in public.
    for device in tf.config.list_physical_devices("GPU"):
        for logical in tf.config.get_logical_device_configuration(device) or ():
            if logical.memory_limit is not None:
                return int(logical.memory_limit) * 2**20
    return None


def device_count() -> int:
    """Returns how many devices a program may be written for."""
    return 1  # each replica runs its own


def splits_sequences() -> bool:
    """Whether each process sees a part of the sequences, unknown to its program."""
    return False  # TensorFlow has no such thing


def shard_index(*tensors: Any) -> Any:
    """Returns the number of this device among those that share the batch under one of
    TensorFlow's strategies, or `None` where there is one."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return None
    return tf.cast(replica.replica_id_in_sync_group, "int32")


def are_taken_over(*layers: Any) -> bool:
    """Whether torch's `fully_shard` has replaced the weights of one of these layers."""
    return False  # on PyTorch some can be


def devices_along(x: Any, axis: int) -> int:
    """Returns over how many devices an axis is sharded that must divide evenly."""
    return 1  # TensorFlow's strategies copy weights


def may_share_heads(x: Any) -> bool:
    """Whether devices may have some of the heads each, for what `x` says, of shape
    `(B, S, K, H)`."""
    return False


def pull_back(function: Callable, tensors: tuple, cotangent: Callable) -> tuple:
    """Returns the gradients of `sum(y * cotangent(y))` with `y = function(*tensors)`,
    `cotangent(y)` taken for constant."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    found = tape.gradient(y, tensors, cotangent(y))
    return tuple(tf.convert_to_tensor(gradient) for gradient in found)


def without_gradients() -> contextlib.AbstractContextManager:
    """Returns a context in which nothing is kept for gradients."""
    return contextlib.nullcontext()  # only what a tape watches keeps them


def known(x: Any) -> np.ndarray | None:
    """Returns the numbers of a tensor, or `None` while a program is only written."""
    x = tf.convert_to_tensor(x)  # a Variable in a graph has numbers, but of before
    return x.numpy() if hasattr(x, "numpy") else None


def is_read_by_compiler() -> bool:
    """Whether a compiler reads the Python that runs now."""
    return False


def constant(numbers: Any, dtype: str | None) -> Any:
    """Returns numbers that are known beforehand as a tensor."""
    return ops.convert_to_tensor(numbers, dtype=dtype)


def columns_at(x: Any, index: Any) -> Any:
    """Returns `x[:, index]` of a matrix and whole numbers of any shape."""
    return ops.take(x, index, axis=1)


def plain(x: Any) -> Any:
    """Returns the tensor that a variable of the backend's own holds now."""
    return tf.convert_to_tensor(x)


def distributed(x: Any, axes: tuple[str | None, ...]) -> Any:
    """Returns `x` shared out along axes of the mesh that is set in Keras."""
    return x  # TensorFlow's strategies know of no layouts


def take_along_axis(x: Any, index: Any, axis: int) -> Any:
    """Returns along one axis what `index` says; other axes of length 1 broadcast."""
    features = tuple(range(2, len(index.shape)))
    is_by_row = axis == 1 and index.shape[0] == x.shape[0]
    if is_by_row and features and all(index.shape[n] == 1 for n in features):
        # Keras would move the axis to the end and back: for a token all of a cache.
        return tf.gather(x, tf.squeeze(index, features), axis=1, batch_dims=1)
    return ops.take_along_axis(x, index, axis=axis)


def with_one_replaced(x: Any, index: Any, new: Any) -> Any:
    """Returns `x` with element `index[b]` of each row `b` replaced by `new[b]`."""
    rows = tf.range(tf.shape(x)[0])
    return tf.tensor_scatter_nd_update(x, tf.stack([rows, index], axis=1), new)


def with_gradient(
    forward: Callable,
    backward: Callable,
    formula: Callable,
    problem: Any,
    tensors: dict[str, Any],
) -> Any:
    """Runs `forward` and differentiates it by `backward`, and by `formula` where more
    than a gradient is asked for; see `blockwise`."""
    names = [name for name in problem.differentiable if name in tensors]
    inputs = [tensors[name] for name in names]
    if in_forward_mode(inputs):
        return formula(problem, tensors)

    held = {name: x for name, x in tensors.items() if name not in names}

    def named(held, inputs):
        return held | dict(zip(names, inputs, strict=True))

    @tf.custom_gradient
    def attention(*inputs):
        run = unrecorded(
            lambda *inputs: repeated(forward, problem, named(held, inputs))
        )
        output, lse = run(*inputs)

        def find(held, output_gradient, *inputs):
            given = named(held, inputs), output, lse, output_gradient
            found = repeated(backward, problem, *given)
            return [found[name] for name in names]

        def find_by_formula(held, output_gradient, *inputs):
            def attend(*inputs):
                return formula(problem, named(held, inputs))

            return pulled_back(attend, inputs, output_gradient)

        gradient = with_derivatives_of(find_by_formula, find, held)
        return output, lambda output_gradient: gradient(output_gradient, *inputs)

    return attention(*inputs)
