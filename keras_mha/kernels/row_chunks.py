"""Attention with some rows of all heads' scores at a time: the reference in pieces.

The weights of talking heads are made of those of all heads, of whole rows: no tile is
enough to work one out. Nor have tiles a gradient of the logarithms of the rows' sums.
But one row says nothing of another. So this is the reference, run on a chunk of the
rows after the other; the gradient works every chunk's scores out again, and memory is
linear in the number of rows.

References:
    Shazeer et al., 2020, Talking-heads attention: https://arxiv.org/abs/2003.02436
    Chen et al., 2016, Training deep nets with sublinear memory cost (computing again):
        https://arxiv.org/abs/1604.06174
"""

import operator
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_mha._keras import Tensor, at_least_float32, dtype_name
from keras_mha._lengths import longer
from keras_mha.kernels import backends, reference
from keras_mha.kernels.call import Attended, AttentionCall
from keras_mha.kernels.problem import (
    Problem,
    call_of,
    positions_first,
    prepared,
)
from keras_mha.kernels.tiling import Pieces, cut_in_pieces
from keras_mha.masks import Tile, whole_tile

# How many scores a chunk has, of all heads and the whole batch: 8 MiB in float32. On a
# CPU chunks of half to four times as many take about the same time.
AT_ONCE = 2**21


@dataclass(frozen=True, kw_only=True)
class _Chunks(Problem):
    """A problem, and how many of its scores are worked out at a time."""

    at_once: int


def attend(call: AttentionCall) -> Attended:
    """Runs one call of attention."""
    problem, tensors = prepared(call)
    fields = vars(problem) | {"extra_features": int(call.return_lse)}
    problem = _Chunks(**fields, at_once=AT_ONCE)
    output = backends.current().with_gradient(
        forward, backward, formula, problem, tensors
    )
    output = positions_first(output)
    if not call.return_lse:
        return Attended(output)
    lse = ops.transpose(output[..., -1], (0, 2, 1))
    return Attended(ops.cast(output[..., :-1], call.query.dtype), lse=lse)


def forward(problem: _Chunks, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        problem: What is to be computed.
        tensors: As of `blockwise.forward`, and the matrices of the talking heads.

    Returns:
        The output, shape `(B, K, V, G, T)`, with a feature more that is the logarithms
        of the rows' sums if they are asked for; and zeros where tiles have these, since
        a chunk is worked out again without them.
    """
    backend, chunks = backends.current(), _cut_rows(problem, tensors)
    batch, groups, _, shared, _ = ops.shape(tensors["query"])
    width = tensors["value"].shape[2] + problem.extra_features
    shape = (batch, groups, width, shared, chunks.size)
    example = tensors["query"][:0]
    dtype = dtype_name(at_least_float32(example) if problem.extra_features else example)
    axes = _axes_of_rows(tensors)

    def visit(index, carry):
        tile = _tile(chunks, index, tensors)
        cut = {name: tile.cut_rows(tensors[name], axes[name]) for name in axes}
        output = _attend(problem, tensors | cut, tile)
        return (backend.put_tile(*carry, index, output),)

    tiles = backend.new_tiles(chunks.count, shape, dtype, tensors["query"])
    (tiles,) = backend.loop(chunks.count, visit, (tiles,))
    output = _joined(chunks, backend.stacked(tiles, chunks.count), 4)
    return output, ops.zeros_like(at_least_float32(output[:, :, :1]))


def backward(
    problem: _Chunks,
    tensors: dict[str, Any],
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
) -> dict[str, Tensor]:
    """Returns the gradients of the differentiable tensors, by name and of their shapes.

    Args:
        problem: As of `forward`.
        tensors: As of `forward`.
        output: What `forward` returned.
        lse: What `forward` returned.
        d_output: The gradient of the output.
    """
    backend, chunks = backends.current(), _cut_rows(problem, tensors)
    names = problem.differentiable
    exact = {name: at_least_float32(tensors[name]) for name in names}
    axes = _axes_of_rows(tensors)
    # Each chunk has rows of its own of these; to all other gradients each one adds.
    cut = {
        name: axes[name] for name in axes if name in names and _varies(name, tensors)
    }
    rest = [name for name in names if name not in cut]

    def visit(index, sums):
        tile = _tile(chunks, index, tensors)
        rows = {
            name: tile.cut_rows((tensors | exact)[name], axes[name]) for name in axes
        }
        given = {name: rows[name] for name in cut} | {
            name: exact[name] for name in rest
        }

        def attend(*values):
            named = rows | dict(zip(given, values, strict=True))
            if "bias" in rest:
                named["bias"] = tile.cut_rows(named["bias"], axes["bias"])
            return _attend(problem, tensors | exact | named, tile)

        def cotangent(found):
            is_new = tile.row_indices[:, 0] >= chunks.first_new(index)
            d_rows = ops.cast(tile.cut_rows(d_output, 4), found.dtype)
            return d_rows * ops.cast(is_new, found.dtype)

        found = backend.pull_back(attend, tuple(given.values()), cotangent)
        joined = map(backend.put_tile, sums, [index] * len(cut), found)
        return (*joined, *map(operator.add, sums[len(cut) :], found[len(cut) :]))

    sums = [_tiles_like(exact[name], cut[name], chunks) for name in cut]
    sums += [ops.zeros_like(exact[name]) for name in rest]
    sums = backend.loop(chunks.count, visit, tuple(sums))
    found = dict(zip((*cut, *rest), sums, strict=True))
    for name, axis in cut.items():
        tiles = backend.stacked(found[name], chunks.count)
        found[name] = _joined(chunks, tiles, axis)
    return {name: ops.cast(found[name], dtype_name(tensors[name])) for name in names}


def formula(problem: _Chunks, tensors: dict[str, Any]) -> Tensor:
    """Attends with all scores at once, by operations that have every derivative."""
    rows, columns = ops.shape(tensors["query"])[4], ops.shape(tensors["key"])[3]
    return _attend(problem, tensors, whole_tile(rows, columns))


def _attend(problem: _Chunks, tensors: dict[str, Any], tile: Tile) -> Tensor:
    """Returns the output, `(B, K, V, G, rows)`, of a query and a bias that have the
    tile's rows alone."""
    call = call_of(problem, tensors)
    output, _, lse = reference.attend_rows(call, tile, tensors.get("seed"))
    if lse is not None:
        lse = ops.transpose(lse, (0, 2, 1))[..., None]
        output = ops.concatenate([ops.cast(output, lse.dtype), lse], axis=-1)
    batch, groups, _, shared, rows = ops.shape(tensors["query"])
    output = ops.reshape(output, (batch, rows, groups, shared, output.shape[3]))
    return ops.transpose(output, (0, 2, 4, 3, 1))


# ---------------------------------------------------------------------- chunks


def _cut_rows(problem: _Chunks, tensors: dict[str, Any]) -> Pieces:
    batch, groups, _, shared, rows = ops.shape(tensors["query"])
    columns = ops.shape(tensors["key"])[3]
    scores_of_row = batch * groups * shared * columns
    size = longer(problem.at_once // longer(scores_of_row, 1), 1)
    if not isinstance(size, int):  # nor may the length be a number then
        rows = ops.convert_to_tensor(rows, dtype="int32")
    return cut_in_pieces(rows, size)


def _tile(chunks: Pieces, index: Any, tensors: dict[str, Any]) -> Tile:
    columns = ops.shape(tensors["key"])[3]
    return Tile(chunks.start(index), chunks.size, 0, columns)


def _axes_of_rows(tensors: dict[str, Any]) -> dict[str, int]:
    """Returns along which axis tensors have the rows of the scores."""
    return {"query": 4} | ({"bias": 3} if "bias" in tensors else {})


def _varies(name: str, tensors: dict[str, Any]) -> bool:
    """Whether a tensor is known to have as many rows as the scores."""
    if name == "query":
        return True
    length = tensors["bias"].shape[3]
    return isinstance(length, int) and length != 1


def _tiles_like(x: Tensor, axis: int, chunks: Pieces) -> Any:
    """Returns zeros for each chunk's rows of a tensor."""
    shape = list(ops.shape(x))
    shape[axis] = chunks.size
    return backends.current().new_tiles(chunks.count, tuple(shape), dtype_name(x), x)


def _joined(chunks: Pieces, tiles: Tensor, axis: int) -> Tensor:
    """Returns the chunks `(count, ...)`, each with its rows along `axis`, as one."""
    rows_last = ops.moveaxis(tiles, (0, axis + 1), (-2, -1))
    return ops.moveaxis(chunks.joined(rows_last), -1, axis)
