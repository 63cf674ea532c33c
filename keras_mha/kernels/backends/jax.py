"""Loops, tiles and gradients on JAX; loops become `while` loops of the program."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from keras_mha.kernels.backends import jax_program
from keras_mha.kernels.backends.jax_differentiable import DEVICES, with_gradient
from keras_mha.kernels.backends.jax_manual_axes import alike, is_varying, shard_index
from keras_mha.kernels.few_scores import FewScores

__all__ = ["shard_index", "with_gradient"]  # beside what is defined here

# Whether programs are lowered later, and perhaps for another kind of device.
LOWERS_LATER = True

# How many heads share a tile on a CPU, and its rows and columns at most, measured: with
# 512 x 512 of one head XLA runs products and softmax together, in a cache.
HEADS_PER_TILE = 1
LARGEST_TILE = 512

# Where products take and give the features of rows, as an axis of `(*lead, G, rows)`
# with them: last, with which products are up to 1.3 times as fast on a CPU.
FEATURES_OF_ROWS = 4

# From how many scores a head tiles take less time than whole scores on a CPU, measured:
# of 8 sequences of 384 with 8 heads they take 0.6 to 0.95 of it, of 256 more, of one of
# 512 about as much.
FEW_SCORES = FewScores(in_all=32 * 320**2, least=320**2, most=512**2)


def as_written(function: Callable) -> Callable:
    """Returns the function, which no compiler is to translate from its source."""
    return function


def loop(
    count: Any, body: Callable, carry: tuple, goes_on: Callable | None = None
) -> tuple:
    """Returns the carry after `carry = body(i, carry)` for `i` in `0 ... count - 1`, up
    to the first of which `goes_on(i, carry)` says no."""

    def turn(index, carry):
        return alike(body(index, carry))

    if goes_on is None:
        return jax.lax.fori_loop(0, count, turn, alike(carry))
    return jax.lax.while_loop(
        lambda state: (state[0] < count) & goes_on(*state),
        lambda state: (state[0] + 1, turn(*state)),
        (jnp.zeros_like(count), alike(carry)),
    )[1]


def either(condition: Any, yes: Callable, no: Callable) -> Any:
    """Runs one of two functions without arguments, by a boolean worked out now."""
    if is_varying():
        # `vmap` of a `cond` compares what varies over devices with what does not, which
        # JAX refuses; of a loop it does not.
        return _in_one_turn(condition, yes, no)
    return jax.lax.cond(condition, lambda: alike(yes()), lambda: alike(no()))


def _in_one_turn(condition, yes, no):
    def turn(carry):
        return alike((jnp.zeros((), bool), yes()))

    carry = alike((jnp.asarray(condition), no()))
    return jax.lax.while_loop(lambda carry: carry[0], turn, carry)[1]


def table(numbers: Any) -> Any:
    """Returns an array of integers that a loop's index may index."""
    return jnp.asarray(numbers).astype(int)  # as wide as the loops' indices


def new_tiles(count: int, shape: tuple, dtype: str, like: Any) -> Any:
    """Returns `count` tiles of zeros."""
    return jnp.zeros((count, *shape), dtype)


def put_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with one of them written."""
    return jax.lax.dynamic_update_index_in_dim(tiles, tile, index, 0)


def add_tile(tiles: Any, index: Any, tile: Any) -> Any:
    """Returns the tiles with something added to one of them."""
    old = jax.lax.dynamic_index_in_dim(tiles, index, keepdims=False)
    return put_tile(tiles, index, old + tile)


def stacked(tiles: Any, count: int) -> Any:
    """Returns all tiles as one tensor, `(count, *shape)`."""
    return tiles


def scores(x: Any, y: Any) -> Any:
    """Of rows `(*lead, G, rows, width)` and columns `(*lead, width, columns)` returns
    their products, `(*lead, G, rows, columns)`."""
    products = _product("bkrd,bkdc->bkrc", _flat_rows(x), y)
    return products.reshape(*x.shape[:4], y.shape[3])


def to_rows(weights: Any, y: Any) -> Any:
    """Returns for rows what columns `(*lead, width, columns)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, G, rows, width)`."""
    sums = _product("bkrc,bkdc->bkrd", _flat_rows(weights), y)
    return sums.reshape(*weights.shape[:4], y.shape[2])


def to_columns(weights: Any, x: Any) -> Any:
    """Returns for columns what rows `(*lead, G, rows, width)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, width, columns)`."""
    return _product("bkrd,bkrc->bkdc", _flat_rows(x), _flat_rows(weights))


def _flat_rows(x):
    """Folds `G` and rows into one axis: a product along two axes is slow on a CPU."""
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _product(equation, x, y):
    """Multiplies in the half type if one of the two is of one; sums are float32."""
    half = next((z.dtype for z in (x, y) if z.dtype.itemsize == 2), None)
    if half is None:
        return jnp.einsum(equation, x, y)
    x, y = x.astype(half), y.astype(half)
    return jnp.einsum(equation, x, y, preferred_element_type="float32")


def product(equation: str, x: Any, y: Any) -> Any:
    """Returns `einsum` of two tensors of one dtype, of half types in float32.

    The axes that are in all three come first, and the larger of `x` and the result
    stays in its order. What XLA itself makes of these products is up to twice as slow
    on a CPU: it multiplies the transposed matrices. Small ones are best left to it.
    """
    many = "ABCDEF"[: x.ndim - len(equation.partition(",")[0].replace("...", ""))]
    operands, result = equation.replace("...", many).split("->")
    of_x, of_y = operands.split(",")
    lead = [axis for axis in result if axis in of_x and axis in of_y]
    rows = [axis for axis in of_x if axis not in of_y]
    summed = [axis for axis in of_x if axis not in result]
    columns = [axis for axis in of_y if axis not in of_x]
    lengths = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    if _is_small(*([lengths[a] for a in axes] for axes in (rows, summed, columns))):
        return _product(f"{operands}->{result}", x, y)
    pairs = [(lengths[a], lengths[b]) for a, b in zip(summed, columns, strict=True)]
    if all(is_length(a) and is_length(b) and a <= b for a, b in pairs):
        rows.sort(key=result.index)
    ordered_x = "".join(lead + rows + summed)
    ordered_y = "".join(lead + [axis for axis in of_y if axis not in lead])
    ordered = "".join(lead + rows + columns)
    x, y = jnp.einsum(f"{of_x}->{ordered_x}", x), jnp.einsum(f"{of_y}->{ordered_y}", y)
    found = _product(f"{ordered_x},{ordered_y}->{ordered}", x, y)
    return jnp.einsum(f"{ordered}->{result}", found)


def _is_small(rows, summed, columns):
    """Whether a product is of so few rows and columns that its order costs more than
    it gains: less than 32 of both, measured."""
    if not all(map(is_length, (*rows, *summed, *columns))):
        return False
    return math.prod(rows) * min(math.prod(summed), math.prod(columns)) < 32**2


def is_computed_now(x: Any) -> bool:
    """Whether operations on a tensor run as Python comes to them."""
    return not isinstance(x, jax.core.Tracer)


def is_better_multiplied(x: Any) -> bool:
    """Whether `multiplied` is better than a call of the layer that does the same."""
    # In programs too, see `_is_better_joined`; of half types a layer's call keeps the
    # gradient's products in them.
    is_half = x.dtype.itemsize <= 2
    return is_better_as_program() or (_is_alone_on_cpu(x) and not is_half)


def is_called_plainly(layer: Any) -> bool:
    """Whether nobody watches, or changes, the calls of a layer."""
    return True  # with torch's modules some can


@functools.partial(jax.jit, static_argnums=3)
def multiplied(x: Any, kernel: Any, bias: Any, axes: int) -> Any:
    """Returns `x . kernel + bias`, a sum over the last `axes` axes of `x`."""
    if not _is_better_joined(x, kernel):
        y = jnp.tensordot(x, kernel, axes)
        return y if bias is None else y + bias
    shape = (*x.shape[: x.ndim - axes], *kernel.shape[axes:])
    kernel = kernel.reshape(math.prod(kernel.shape[:axes]), -1)
    y = x.reshape(-1, kernel.shape[0]) @ kernel
    return (y if bias is None else y + bias.reshape(-1)).reshape(shape)


def _is_better_joined(x, kernel):
    """Whether a product is faster with two axes each: the kernel's gradient comes as it
    is stored, and is else transposed and copied, which takes up to half of a training
    step of one short sequence. Of long ones that is little."""
    is_known = all(isinstance(size, int) for size in x.shape)
    return _is_alone_on_cpu(x) and is_known and x.size <= kernel.size


def _is_alone_on_cpu(x):
    """Whether no axis can be shared out over devices; such are not to be joined."""
    return device_kind(x) == "cpu" and device_count() == 1


def row_max(x: Any) -> Any:
    """Returns the largest number along the last axis."""
    return x.max(-1)


def exp_minus(x: Any, rows: Any) -> Any:
    """Returns `exp(x - rows)` with one number a row; `x` may be written over."""
    return jnp.exp(x - rows[..., None])


def xor_shifted_times(x: Any, bits: int, factor: int) -> Any:
    """Returns `(x ^ (x >> bits)) * factor` of int32, with the sign shifted in and the
    product cut to 32 bits; `x` may be written over."""
    return (x ^ (x >> bits)) * factor


def is_better_as_program() -> bool:
    """Whether operations are run one by one, and would be faster as one program."""
    # What is made of nothing is traced in a program, not in a gradient or a `vmap`.
    return is_computed_now(jax.lax.full((), 0))


def as_one_program(function: Callable, tensors: tuple, option: Any) -> Any:
    """Returns `function(option, *tensors)`, where it is better run as one program."""
    if not is_better_as_program():
        return function(option, *tensors)  # which becomes part of one
    # How heads are shared is no tensor either.
    distribution = keras.distribution.distribution()
    return _program(function, distribution)(option, *tensors)


@functools.cache
def _program(function, distribution):
    # An object of its own for each: JAX finds programs again by their function.
    return jax.jit(functools.partial(function), static_argnums=0)


def at_least(numbers: Any, threshold: int) -> Any:
    """Returns which int32 are not below a threshold, as `keep` takes it."""
    return numbers >= threshold


def keep(x: Any, kept: Any) -> Any:
    """Returns `x` with zeros where `at_least` said no."""
    return jnp.where(kept, x, 0)


def is_length(x: Any) -> bool:
    """Whether loops can run over an axis of this length."""
    return isinstance(x, int)  # an exported program's lengths are symbols


def device_kind(x: Any) -> str:
    """Returns the kind of device that computes with `x`; see `kernels.call`. A program
    that is being written may yet be lowered for another."""
    platform = jax.default_backend()
    if platform == "gpu" and _runs_cuda():
        platform = "cuda"
    return DEVICES.get(platform, "other")


def device_memory() -> int | None:
    """Returns how many bytes the fastest device has, `None` if it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _runs_cuda():
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def device_count() -> int:
    """Returns how many devices a program may be written for."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names and set(mesh.axis_names) == set(mesh.manual_axes):
        return 1  # within `jax.shard_map` each runs its own
    return jax_program.current().devices or jax.device_count()


def splits_sequences() -> bool:
    """Whether each process sees a part of the sequences, unknown to its program."""
    return False  # that is written out there, and the compiler sees to it


def are_taken_over(*layers: Any) -> bool:
    """Whether torch's `fully_shard` has replaced the weights of one of these layers."""
    return False  # on PyTorch some can be


def devices_along(x: Any, axis: int) -> int:
    """Returns over how many devices an axis is sharded that must divide evenly."""
    return 1  # a program is of the whole there


def may_share_heads(x: Any) -> bool:
    """Whether devices may have some of the heads each, for what `x` says, of shape
    `(B, S, K, H)`."""
    distribution = keras.distribution.distribution()
    return isinstance(distribution, keras.distribution.ModelParallel)


def pull_back(function: Callable, tensors: tuple, cotangent: Callable) -> tuple:
    """Returns the gradients of `sum(y * cotangent(y))` with `y = function(*tensors)`,
    `cotangent(y)` taken for constant."""
    y, gradients = jax.vjp(function, *tensors)
    return gradients(cotangent(y))


def without_gradients() -> contextlib.AbstractContextManager:
    """Returns a context in which nothing is kept for gradients."""
    return contextlib.nullcontext()  # only where jax.grad is asked for them


def known(x: Any) -> np.ndarray | None:
    """Returns the numbers of a tensor, or `None` while a program is only written."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


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
    return x


def distributed(x: Any, axes: tuple[str | None, ...]) -> Any:
    """Returns `x` shared out along axes of the mesh that is set in Keras."""
    mesh = keras.distribution.distribution().device_mesh
    devices = dict(zip(mesh.axis_names, mesh.shape, strict=True)) | {None: 1}
    sizes = zip(x.shape, axes, strict=True)
    axes = [axis if size % devices[axis] == 0 else None for size, axis in sizes]
    layout = keras.distribution.TensorLayout(axes, mesh)
    return keras.distribution.distribute_tensor(x, layout)


def take_along_axis(x: Any, index: Any, axis: int) -> Any:
    """Returns along one axis what `index` says; other axes of length 1 broadcast."""
    return ops.take_along_axis(x, index, axis=axis)


def with_one_replaced(x: Any, index: Any, new: Any) -> Any:
    """Returns `x` with element `index[b]` of each row `b` replaced by `new[b]`."""

    def put():
        # Row by row, which a compiler need not gather where devices share the batch.
        return jax.vmap(lambda row, index, new: row.at[index].set(new))(x, index, new)

    if device_kind(x) != "cpu" or not isinstance(x, jax.core.Tracer):
        return put()
    # Always so, which the compiler is not to know: it would write the tensor anew for
    # every operation that reads it, and copy it for that.
    always = jax.lax.optimization_barrier(jnp.bool_(True))
    return either(always, put, lambda: x)


def drawn(generator: Any, draw: Callable) -> Any:
    """Returns `draw(generator)`, or what it returned before where a gradient computes
    the same again."""
    return draw(generator)  # of a traced function nothing is run again
