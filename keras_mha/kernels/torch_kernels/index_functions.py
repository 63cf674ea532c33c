"""Masks and biases as functions of indices, as PyTorch's flex_attention takes them.

It asks for one pair at a time, `(batch row, query head, query, key)`, each a scalar
tensor of whole numbers, and compiles what it is given into its kernel. So a function
may do with them what is done to each number alone, and look them up in tensors.

References:
    Dong et al., 2024, Flex Attention: https://arxiv.org/abs/2412.05496
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keras_mha.biases import (
    Bias,
    ByDistance,
    Euclidean,
    InWindow,
    Manhattan,
    Positions,
    Slopes,
)
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.static_parts import as_constants, from_constants
from keras_mha.kernels.torch_kernels.kept import kept
from keras_mha.masks import (
    And,
    Causal,
    Dense,
    Mask,
    Not,
    Or,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
)
from keras_mha.memory_columns import BiasBesideMemory, MaskBesideMemory

OfIndices = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of batch row, query head, query and key."""


# ----------------------------------------------------------------------------- tensors


def look_up(x: Tensor, axes: str) -> OfIndices:
    """Returns what finds numbers of a tensor, whose axes of length 1 broadcast.

    Args:
        x: A tensor.
        axes: What its axes stand for, of `"bhqk"`, in this order.
    """
    which = ["bhqk".index(axis) for axis in axes]
    is_one = [length == 1 for length in x.shape]

    def found(*indices):
        # No axis is left out: gradients of numbers are found by their indices only.
        places = [
            torch.zeros_like(indices[i]) if one else indices[i]
            for i, one in zip(which, is_one, strict=True)
        ]
        return x[tuple(places)]

    return found


# ------------------------------------------------------------------------------- masks


def refusal_of_mask(mask: Mask | None) -> str | None:
    """Returns why a mask is no function of indices, or `None` if it is one."""
    if mask is None or type(mask) in _LEAVES:
        return None
    if type(mask) in (And, Or):
        return refusal_of_mask(mask.left) or refusal_of_mask(mask.right)
    if type(mask) in (Not, MaskBesideMemory):
        return refusal_of_mask(mask.mask)
    name = type(mask).__name__
    if type(mask).block is not Mask.block:
        return f"flex_attention asks for pairs, and {name} answers for tiles"
    if not _is_pointwise(mask):
        return f"flex_attention cannot compile what {name} does with positions"
    return None


def mask_function(mask: Mask) -> OfIndices:
    """Returns a mask that is not refused as a function of indices: booleans."""
    kind = type(mask)
    if kind in _LEAVES:
        return _LEAVES[kind](mask)
    if kind in (And, Or):
        left, right = mask_function(mask.left), mask_function(mask.right)
        if kind is And:
            return lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k)
        return lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k)
    if kind is Not:
        opposite = mask_function(mask.mask)
        return lambda b, h, q, k: ~opposite(b, h, q, k)
    if kind is MaskBesideMemory:
        behind, count = mask_function(mask.mask), mask.count
        return lambda b, h, q, k: (k < count) | behind(b, h, q, (k - count).clamp(0))
    return _of_positions(mask)


def _causal(mask):
    if isinstance(mask.offset, int):
        offset = mask.offset
        return lambda b, h, q, k: k <= q + offset
    offsets = look_up(mask.offset, "b")
    return lambda b, h, q, k: k <= q + offsets(b, h, q, k)


def _sliding_window(mask):
    size = mask.size
    return lambda b, h, q, k: (q - k).abs() < size


def _prefix(mask):
    if isinstance(mask.n, int):
        n = mask.n
        return lambda b, h, q, k: k < n
    lengths = look_up(mask.n, "b")
    return lambda b, h, q, k: k < lengths(b, h, q, k)


def _padding(mask):
    valid = look_up(mask.valid.to(torch.bool), "bk")
    return lambda b, h, q, k: valid(b, h, q, k)


def _segments(mask):
    queries, keys = look_up(mask.query_ids, "bq"), look_up(mask.key_ids, "bk")
    return lambda b, h, q, k: queries(b, h, q, k) == keys(b, h, q, k)


def _dense(mask):
    values = mask.values.to(torch.bool)
    return look_up(values, {2: "qk", 3: "bqk", 4: "bhqk"}[values.ndim])


_LEAVES = {
    Causal: _causal,
    SlidingWindow: _sliding_window,
    Prefix: _prefix,
    Padding: _padding,
    Segments: _segments,
    Dense: _dense,
}


def _of_positions(mask):
    def allowed(b, h, q, k):
        return mask.allowed(q.to(torch.int32), k.to(torch.int32)).to(torch.bool)

    return allowed


def _is_pointwise(mask: Mask) -> bool:
    """Whether what a mask says of positions it works out for each pair alone: of two
    scalars, by operations on single numbers and by looking up."""
    parts, tensors = split_tensors(mask)
    if not torch.compiler.is_compiling():
        return _is_pointwise_of(parts, tensors)
    # While a program is written tensors hold no numbers to try with.
    return not tensors and _is_known_pointwise(as_constants(parts))


@torch._dynamo.assume_constant_result
def _is_known_pointwise(constants):
    return _is_pointwise_of(from_constants(constants), ())


_pointwise: dict[Any, bool] = {}  # by a mask's parts, and the axes of its tensors


def _is_pointwise_of(parts, tensors):
    key = parts, tuple(x.ndim for x in tensors)
    if key not in _pointwise:
        if len(_pointwise) >= 256:  # a mask may be another at each call
            _pointwise.clear()
        mask = join_tensors(parts, tensors)
        _pointwise[key] = _has_pointwise_graph(_of_positions(mask))
    return _pointwise[key]


def _has_pointwise_graph(function: OfIndices) -> bool:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.fx.experimental.proxy_tensor import make_fx

    zero = torch.zeros((), dtype=torch.int32)
    try:
        # As flex_attention does: what a scalar tensor indexes is looked up.
        with TransformGetItemToIndex():
            graph = make_fx(function)(zero, zero, zero, zero)
            shape = function(zero, zero, zero, zero).shape
    except Exception:  # of a user's code: whatever it is, it is no such function
        return False
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    return shape == () and all(_is_for_each_number(node.target) for node in nodes)


def _is_for_each_number(operator: Any) -> bool:
    aten = torch.ops.aten
    others = aten.index.Tensor, aten._to_copy.default, aten.detach.default
    return operator in others or torch.Tag.pointwise in getattr(operator, "tags", ())


# ------------------------------------------------------------------------------ biases


def refusal_of_bias(bias: Bias | None) -> str | None:
    """Returns why a bias is no function of indices, or `None` if it is one."""
    if type(bias) is BiasBesideMemory:
        return refusal_of_bias(bias.bias)
    if bias is None or type(bias) in (Slopes, ByDistance):
        kind = None if bias is None else type(bias.positions)
        if kind in (None, Positions, *_DISTANCES):
            return None
    return f"flex_attention asks for pairs, and {type(bias).__name__} answers for tiles"


def bias_function(bias: Bias, rows: int, columns: int, device: Any) -> OfIndices:
    """Returns a bias that is not refused as a function of indices.

    Args:
        bias: The bias.
        rows: Number of queries.
        columns: Number of keys.
        device: Where the numbers are.
    """
    if type(bias) is BiasBesideMemory:
        count = bias.count
        behind = bias_function(bias.bias, rows, columns - count, device)

        def beside(b, h, q, k):
            found = behind(b, h, q, (k - count).clamp(0))
            return torch.where(k < count, torch.zeros_like(found), found)

        return beside
    if type(bias) is Slopes:
        slopes = _on_device(bias.slopes, device)
        distance = _distance(bias.positions)
        return lambda b, h, q, k: -slopes[h] * distance(b, h, q, k).abs().float()
    if bias.positions.are_counted:
        return _along_diagonals(bias, rows, columns, device)
    values, distance = bias.values, _distance(bias.positions)
    most = values.shape[1] // 2
    return lambda b, h, q, k: values[
        h, distance(b, h, q, k).clamp(-most, most).to(h.dtype) + most
    ]


def _along_diagonals(bias, rows, columns, device):
    """A number for each diagonal, found beforehand: what far pairs add to the gradient
    would otherwise go to the same two numbers of a table, one addition after another.
    """
    most = bias.values.shape[1] // 2
    distances = torch.arange(1 - rows, columns, device=device)
    values = bias.values[:, distances.clamp(-most, most) + most]
    # A tensor: a number would be part of the program, which is kept for all lengths.
    origin = torch.full((), rows - 1, dtype=torch.int32, device=device)
    return lambda b, h, q, k: values[h, k - q + origin.to(q.dtype)]


def _on_device(numbers: tuple[float, ...], device: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return _kept_on_device(numbers, device)


@kept(most=64)
def _kept_on_device(numbers, device):
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _distance(positions: Positions) -> OfIndices:
    if positions.are_counted:
        return lambda b, h, q, k: k - q
    if type(positions) is Positions:
        return _along(positions.query, positions.key)
    along = [
        _along(positions.query[..., axis], positions.key[..., axis])
        for axis in range(positions.axes)
    ]
    return _DISTANCES[type(positions)](positions, along)


def _along(query: Tensor | None, key: Tensor | None) -> OfIndices:
    queries = _index_of_query if query is None else look_up(query.to(torch.int32), "bq")
    keys = _index_of_key if key is None else look_up(key.to(torch.int32), "bk")
    return lambda b, h, q, k: keys(b, h, q, k) - queries(b, h, q, k)


def _index_of_query(b, h, q, k):
    return q


def _index_of_key(b, h, q, k):
    return k


def _manhattan(positions, along):
    return lambda *indices: sum(each(*indices).abs() for each in along)


def _euclidean(positions, along):
    return lambda *indices: sum(each(*indices).float() ** 2 for each in along).sqrt()


def _in_window(positions, along):
    sizes = positions.window

    def number(*indices):
        found = 0
        for each, size in zip(along, sizes, strict=True):
            step = (-each(*indices)).clamp(1 - size, size - 1)
            found = found * (2 * size - 1) + step
        return found

    return number


_DISTANCES = {Manhattan: _manhattan, Euclidean: _euclidean, InWindow: _in_window}
