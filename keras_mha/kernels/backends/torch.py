"""Loops, tiles and gradients on PyTorch: loops are Python's, tiles are lists."""

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from keras import ops

from keras_mha.kernels.backends.torch_differentiable import of_formula, takes_formula
from keras_mha.kernels.backends.torch_operators import as_node
from keras_mha.kernels.backends.torch_recomputing import drawn
from keras_mha.kernels.few_scores import FewScores

__all__ = ["drawn"]  # beside what is defined here

# Whether programs are lowered later, and perhaps for another kind of device.
LOWERS_LATER = False

# How many heads share a tile on a CPU, measured: enough work for one call of an
# operation, and little enough to stay in a cache.
HEADS_PER_TILE = 8

# Rows and columns of a tile on a CPU at most.
LARGEST_TILE = 512

# Where products take and give the features of rows, as an axis of `(*lead, G, rows)`
# with them.
FEATURES_OF_ROWS = 2

# From how many scores tiles are faster than whole scores on a CPU, measured: arrays of
# more than 32 MiB are not kept, and each is fetched from the system anew.
FEW_SCORES = FewScores(in_all=6_000_000, least=2**17, most=1024**2)


def as_written(function: Callable) -> Callable:
    """Returns the function, which no compiler is to translate from its source."""
    return function


def loop(
    count: int, body: Callable, carry: tuple, goes_on: Callable | None = None
) -> tuple:
    """Returns the carry after `carry = body(i, carry)` for `i` in `0 ... count - 1`, up
    to the first of which `goes_on(i, carry)` says no."""
    for index in range(count):
        if goes_on is not None and not goes_on(index, carry):
            break
        carry = body(index, carry)
    return carry


def either(condition: Any, yes: Callable, no: Callable) -> Any:
    """Runs one of two functions without arguments, by a boolean worked out now."""
    return yes() if condition else no()


def table(numbers: Any) -> Any:
    """Returns an array of integers that a loop's index may index."""
    return numbers.tolist()


class _Tiles(list):
    """Tiles that are zero, and not stored, until they are written."""

    def __init__(self, count, shape, dtype, device):
        super().__init__([None] * count)
        self.zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)


def new_tiles(count: int, shape: tuple, dtype: str, like: Any) -> _Tiles:
    """Returns `count` tiles of zeros."""
    return _Tiles(count, shape, getattr(torch, dtype), like.device)


def put_tile(tiles: _Tiles, index: int, tile: Any) -> _Tiles:
    """Returns the tiles with one of them written."""
    tiles[index] = tile
    return tiles


def add_tile(tiles: _Tiles, index: int, tile: Any) -> _Tiles:
    """Returns the tiles with something added to one of them."""
    tiles[index] = tile if tiles[index] is None else tiles[index].add_(tile)
    return tiles


def stacked(tiles: _Tiles, count: int) -> Any:
    """Returns all tiles as one tensor, `(count, *shape)`."""
    return torch.stack([tiles.zeros if tile is None else tile for tile in tiles])


def scores(x: Any, y: Any) -> Any:
    """Of rows `(*lead, width, G, rows)` and columns `(*lead, width, columns)` returns
    their products, `(*lead, G, rows, columns)`."""
    products = _product(x.flatten(3).mT, y)
    return products.unflatten(2, x.shape[3:])


def to_rows(weights: Any, y: Any) -> Any:
    """Returns for rows what columns `(*lead, width, columns)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, width, G, rows)`."""
    sums = _product(y, weights.flatten(2, 3).mT)
    return sums.unflatten(3, weights.shape[2:4])


def to_columns(weights: Any, x: Any) -> Any:
    """Returns for columns what rows `(*lead, width, G, rows)` add up to, with weights
    `(*lead, G, rows, columns)`: `(*lead, width, columns)`."""
    return _product(x.flatten(3), weights.flatten(2, 3))


def _product(x, y):
    """Multiplies in the half type if one of the two is of one; sums are float32."""
    half = next((z.dtype for z in (x, y) if z.dtype.itemsize == 2), None)
    if half is None:
        return torch.matmul(x, y)
    x, y = x.to(half), y.to(half)
    if x.device.type != "cuda":  # no other multiplies half types into float32
        return torch.matmul(x.float(), y.float())
    products = torch.bmm(x.flatten(0, 1), y.flatten(0, 1), out_dtype=torch.float32)
    return products.unflatten(0, x.shape[:2])


def product(equation: str, x: Any, y: Any) -> Any:
    """Returns `einsum` of two tensors of one dtype, of half types in float32 (where
    each number was rounded to the half type)."""
    products = ops.einsum(equation, x, y)
    return ops.cast(products, "float32") if x.dtype.itemsize == 2 else products


def is_computed_now(x: Any) -> bool:
    """Whether operations on a tensor run as Python comes to them."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def is_better_multiplied(x: Any) -> bool:
    """Whether `multiplied` is better than a call of the layer that does the same."""
    return is_computed_now(x)  # of a program nothing is left of the call


def is_called_plainly(layer: Any) -> bool:
    """Whether nobody watches, or changes, the calls of a layer, which is a module."""
    own = (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
    )
    return not (own or torch.nn.modules.module._has_any_global_hook())


def multiplied(x: Any, kernel: Any, bias: Any, axes: int) -> Any:
    """Returns `x . kernel + bias`, a sum over the last `axes` axes of `x`."""
    shape = (*x.shape[: x.ndim - axes], *kernel.shape[axes:])
    kernel = kernel.flatten(0, axes - 1).flatten(1)
    x = x.reshape(-1, kernel.shape[0])
    if bias is None:
        return torch.mm(x, kernel).reshape(shape)
    return torch.addmm(bias.flatten(), x, kernel).reshape(shape)


def row_max(x: Any) -> Any:
    """Returns the largest number along the last axis."""
    return x.amax(-1)


def exp_minus(x: Any, rows: Any) -> Any:
    """Returns `exp(x - rows)` with one number a row; `x` may be written over."""
    return x.sub_(rows[..., None]).exp_()


def xor_shifted_times(x: Any, bits: int, factor: int) -> Any:
    """Returns `(x ^ (x >> bits)) * factor` of int32, with the sign shifted in and the
    product cut to 32 bits; `x` may be written over."""
    return x.bitwise_xor_(x >> bits).mul_(factor)


def is_better_as_program() -> bool:
    """Whether operations are run one by one, and would be faster as one program."""
    return False


def as_one_program(function: Callable, tensors: tuple, option: Any) -> Any:
    """Returns `function(option, *tensors)`, where it is better run as one program."""
    return function(option, *tensors)


def at_least(numbers: Any, threshold: int) -> Any:
    """Returns which int32 are not below a threshold, as `keep` takes it."""
    # Comparing and choosing take several times as long on a CPU as arithmetic on whole
    # numbers: all bits set stands for yes, none for no.
    return ((numbers >> 1).sub_(threshold >> 1) >> 31).bitwise_not_()


def keep(x: Any, kept: Any) -> Any:
    """Returns `x` with zeros where `at_least` said no."""
    if x.dtype == torch.float32 and not x.requires_grad and not takes_formula():
        return (x.view(torch.int32) & kept).view(torch.float32)
    return torch.where(kept != 0, x, 0)


def is_length(x: Any) -> bool:
    """Whether loops can run over an axis of this length."""
    return not is_exporting()  # no Python loop in an exported program


def is_exporting() -> bool:
    """Whether a program is written that is to run without Python."""
    # `torch.export`, or TorchScript, which ONNX and OpenVINO are exported by.
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def device_kind(x: Any) -> str:
    """Returns the kind of device that computes with `x`; see `kernels.call`."""
    # Of a `keras.KerasTensor` it is where Keras puts a tensor.
    device = x.device if isinstance(x, torch.Tensor) else ops.zeros(()).device
    # As "cuda" torch knows AMD's too, which run the same kernels.
    return {"cpu": "cpu", "cuda": "gpu", "xla": "tpu"}.get(device.type, "other")


def device_memory() -> int | None:
    """Returns how many bytes the fastest device has, `None` if it does not say."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def device_count() -> int:
    """Returns how many devices a program may be written for."""
    return 1  # each process runs its own


def splits_sequences() -> bool:
    """Whether each process sees a part of the sequences, unknown to its program."""
    # In `context_parallel` a function of torch.distributed stands in for torch's own.
    function = torch.nn.functional.scaled_dot_product_attention
    is_python = isinstance(function, types.FunctionType)
    return is_python and str(function.__module__).startswith("torch.distributed.")


def shard_index(*tensors: Any) -> Any:
    """Returns the number of this device among those that these tensors vary over, or
    `None` where nothing says that they vary."""
    return None  # as types of JAX do


def are_taken_over(*layers: Any) -> bool:
    """Whether torch's `fully_shard` has replaced the weights of one of these layers."""
    # So torch notes it for its compiler.
    return any(getattr(x, "_is_fsdp_managed_module", False) for x in layers)


def devices_along(x: Any, axis: int) -> int:
    """Returns over how many devices an axis is sharded that must divide evenly."""
    if not isinstance(x, torch.Tensor) or not hasattr(x, "placements"):
        return 1  # not a DTensor
    return math.prod(
        x.device_mesh.size(dimension)
        for dimension, placement in enumerate(x.placements)
        if placement.is_shard(axis)
    )


def may_share_heads(x: Any) -> bool:
    """Whether devices may have some of the heads each, for what `x` says, of shape
    `(B, S, K, H)`."""
    return devices_along(x, 2) > 1


def pull_back(function: Callable, tensors: tuple, cotangent: Callable) -> tuple:
    """Returns the gradients of `sum(y * cotangent(y))` with `y = function(*tensors)`,
    `cotangent(y)` taken for constant."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        y = function(*inputs)
    if not y.requires_grad:  # it may be constant: in a tile of learned keys alone, say
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(y, inputs, cotangent(y.detach()))


def without_gradients() -> contextlib.AbstractContextManager:
    """Returns a context in which nothing is kept for gradients."""
    return torch.no_grad()


def known(x: Any) -> np.ndarray | None:
    """Returns the numbers of a tensor, or `None` while a program is only written."""
    if torch.compiler.is_compiling() or is_exporting():
        return None
    try:
        return x.detach().cpu().numpy()
    except RuntimeError:  # of `torch.func` and on the meta device there are none
        return None


def is_read_by_compiler() -> bool:
    """Whether a compiler reads the Python that runs now."""
    return torch.compiler.is_dynamo_compiling()


def constant(numbers: Any, dtype: str | None) -> Any:
    """Returns numbers that are known beforehand as a tensor."""
    # Keras goes by way of NumPy, or from number to number: compilers cannot, or slowly.
    dtype = None if dtype is None else getattr(torch, dtype)
    return ops.convert_to_tensor(torch.as_tensor(numbers, dtype=dtype))


def columns_at(x: Any, index: Any) -> Any:
    """Returns `x[:, index]` of a matrix and whole numbers of any shape."""
    # Not by `keras.ops.take`, whose way to it no exporter knows.
    found = torch.index_select(x, 1, torch.reshape(index, (-1,)).long())
    return torch.reshape(found, (x.shape[0], *index.shape))


def plain(x: Any) -> Any:
    """Returns the tensor that a variable of the backend's own holds now."""
    return x


def distributed(x: Any, axes: tuple[str | None, ...]) -> Any:
    """Returns `x` shared out along axes of the mesh that is set in Keras."""
    return x  # Keras distributes nothing there


def take_along_axis(x: Any, index: Any, axis: int) -> Any:
    """Returns along one axis what `index` says; other axes of length 1 broadcast."""
    # torch's own that broadcasts makes a constant of a batch that `torch.export` leaves
    # open.
    shape = list(x.shape)
    shape[axis] = index.shape[axis]
    return torch.gather(x, axis, index.expand(shape).long())


def with_one_replaced(x: Any, index: Any, new: Any) -> Any:
    """Returns `x` with element `index[b]` of each row `b` replaced by `new[b]`."""
    rows = torch.arange(x.shape[0], device=x.device)
    return x.index_put((rows, index), new)


def with_gradient(
    forward: Callable,
    backward: Callable,
    formula: Callable,
    problem: Any,
    tensors: dict[str, Any],
) -> Any:
    """Runs `forward` and differentiates it by `backward`, and by `formula` where more
    than a gradient is asked for; see `blockwise`."""
    if takes_formula():
        return formula(problem, tensors)
    if torch.compiler.is_compiling():
        return _as_node(forward, backward, problem, tensors)
    names = [name for name in problem.differentiable if name in tensors]
    inputs = [tensors[name] for name in names]
    return _Attention.apply(
        forward, backward, formula, problem, tensors, names, *inputs
    )


def _as_node(forward, backward, problem, tensors):
    """Writes tiles into a program that is compiled."""
    names = tuple(name for name in tensors if name != "mask")
    # Masks get no gradient, of floating-point numbers that are trained neither.
    masks = [x.detach() for x in tensors["mask"]]
    given = [tensors[name] for name in names] + masks
    arguments = forward, backward, type(problem), tuple(vars(problem).items()), names
    return as_node(_Node, arguments, given)


class _Node:
    """Tiles as a kernel for `torch_operators`."""

    def __init__(self, forward, backward, kind, fields, names):
        self._forward, self._backward = forward, backward
        self._problem, self._names = kind(**dict(fields)), names

    def _by_name(self, tensors):
        count = len(self._names)
        by_name = dict(zip(self._names, tensors[:count], strict=True))
        return by_name | {"mask": tuple(tensors[count:])}

    def attend(self, tensors):
        return self._forward(self._problem, self._by_name(tensors))

    def outlines(self, tensors):
        tensors = self._by_name(tensors)
        query, value = tensors["query"], tensors["value"]
        batch, groups, _, shared, rows = query.shape
        extra = self._problem.extra_features
        shape = (batch, groups, value.shape[2] + extra, shared, rows)
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty((*shape[:2], 1, *shape[3:]), dtype=dtype)
        return query.new_empty(shape, dtype=dtype if extra else query.dtype), lse

    def gradients(self, tensors, output, kept, output_gradient, wanted):
        names = tuple(self._names[place] for place in wanted)
        problem = dataclasses.replace(self._problem, differentiable=names)
        tensors = self._by_name(tensors)
        found = self._backward(problem, tensors, output, kept, output_gradient)
        return [found[name] for name in names]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, formula, problem, tensors, names, *inputs):
        tensors = {n: x for n, x in tensors.items() if n not in names}
        output, lse = forward(problem, tensors | dict(zip(names, inputs, strict=True)))
        ctx.save_for_backward(*inputs, output, lse)
        ctx.rest = backward, formula, problem, tensors, names
        return output

    @staticmethod
    def backward(ctx, output_gradient):
        backward, formula, problem, tensors, names = ctx.rest
        *inputs, output, lse = ctx.saved_tensors

        def with_inputs(*inputs):
            return tensors | dict(zip(names, inputs, strict=True))

        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            found = of_formula(
                lambda *inputs: formula(problem, with_inputs(*inputs)),
                inputs,
                output_gradient,
            )
            return (None,) * 6 + tuple(found)
        needed = zip(names, ctx.needs_input_grad[6:], strict=True)
        needed = tuple(name for name, is_needed in needed if is_needed)
        problem = dataclasses.replace(problem, differentiable=needed)
        found = backward(problem, with_inputs(*inputs), output, lse, output_gradient)
        return (None,) * 6 + tuple(found.get(name) for name in names)
