"""torch's CPU kernel with a bias that follows from the distance alone.

Such a bias is the same all along a diagonal of the scores. With the keys in reverse
order, `j' = S - 1 - j`, it is

    bias[i, j'] = of_distance(j - i) = along[i + j'],

so that each row is the one above it moved by one number. The kernel is therefore given,
as its mask of T x S numbers, a view of `T + S - 1` numbers whose strides are both 1. A
causal mask is minus infinity in these numbers. The kernel is called for some rows at a
time, with the keys from the first to the last that matter to any of them.

A key does not matter to a query, and is left out, if its weight is under 1e-30 of the
query's largest. The logit of the query's own key (of the last key, where there are
fewer keys than queries) is worked out, `own_i`; by Cauchy and Schwarz no product is
larger than `most_i`; and so these are the keys for which

    bias[i, j'] + most_i < own_i + log(1e-30),    most_i = |scale| |q_i| max_j |k_j|.

With ALiBi these are all from some distance on, the sooner the steeper the head. Where
numbers are large or not finite nothing is left out.

References:
    Dao et al., 2022, FlashAttention: https://arxiv.org/abs/2205.14135
    Press et al., 2022, Train short, test long: https://arxiv.org/abs/2108.12409
"""

from collections.abc import Iterator

import torch
from keras import ops
from torch.nn import functional

from keras_mha._keras import Tensor
from keras_mha.biases import DistanceBias
from keras_mha.kernels.backends.torch_differentiable import of_formula
from keras_mha.kernels.backends.torch_operators import as_node
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.far_tiles import NEGLIGIBLE, ROUNDING
from keras_mha.kernels.torch_kernels import flash_cpu
from keras_mha.kernels.torch_kernels.diagonal_gradients import (
    Attended,
    Gradients,
    Scores,
)
from keras_mha.masks import whole_tile

# Rows of a slice, measured: with fewer the calls cost more, with more the keys that
# only some of the rows may see.
_ROWS = 512
_STEP = 256  # Heads are called apart if the keys that matter differ by so many.
_ROWS_A_TASK = 64  # How torch's kernel shares rows of a slice among threads.


def takes(call: AttentionCall) -> bool:
    """Whether this way is open to a call without dropout of many rows."""
    bias = call.position_bias
    if call.bias is not None or not isinstance(bias, DistanceBias):
        return False
    is_along_diagonals = type(bias).block is DistanceBias.block
    if not (is_along_diagonals and bias.positions.are_counted and bias.is_finite):
        return False
    return flash_cpu.takes(call)


def attend(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns the output, shape `(B, N, T, H)`.

    Args:
        call: A call that `takes` says yes to.
        query: Shape `(B, N, T, H)`.
        key: Shape `(B, K, S, H)`.
        value: Shape `(B, K, S, H)`.
    """
    tensors = [query, key, value, _numbers(call).to(query.dtype)]
    arguments = call.mask is not None, call.scale
    if torch.compiler.is_compiling():
        return as_node(_Diagonals, arguments, tensors)
    return _Attention.apply(_Diagonals(*arguments), *tensors)


def _numbers(call):
    """Returns the bias of the distances `-M ... M`, shape `(N, 2 M + 1)`; farther ones,
    if there are any, have that of the farthest."""
    bias = call.position_bias
    _, heads, rows, columns = call.scores_shape
    most = max(rows, columns) - 1 if bias.reach is None else bias.reach
    distances = ops.arange(-most, most + 1, dtype="int32")
    numbers = bias.of_distances(distances, whole_tile(rows, columns))
    return numbers.expand(heads, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, *tensors):
        output, lse = kernel.attend(tensors)
        ctx.kernel = kernel
        ctx.save_for_backward(*tensors, output, lse)
        return output

    @staticmethod
    def backward(ctx, output_gradient):
        *tensors, output, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            return None, *of_formula(ctx.kernel.formula, tensors, output_gradient)
        is_wanted = ctx.needs_input_grad[1:]
        wanted = [place for place, wants in enumerate(is_wanted) if wants]
        given = tensors, output, lse, output_gradient, wanted
        found = iter(ctx.kernel.gradients(*given))
        return None, *(next(found) if wants else None for wants in is_wanted)


class _Diagonals:
    """The kernel for `torch_operators`: of query, key, value and `_numbers`.

    Args:
        is_causal: Whether keys after the query are hidden.
        scale: Factor of the dot products.
    """

    def __init__(self, is_causal: bool, scale: float):
        self._is_causal, self._scale = is_causal, scale

    def formula(self, query, key, value, numbers):
        """The same by operations that have every derivative."""
        scores = Scores.of(query, key, value, numbers, self._is_causal, self._scale)
        return torch.ops.aten._scaled_dot_product_attention_math(
            *scores[:3], attn_mask=scores.bias(), scale=self._scale
        )[0]

    @torch.no_grad()
    def attend(self, tensors):
        scores = Scores.of(*tensors, self._is_causal, self._scale)
        query = scores.query
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
        for heads, rows, columns in _pieces(scores, _ROWS_A_TASK):
            part = scores.part(heads, rows, columns)
            found = flash_cpu.forward(*part[:3], part.bias(), self._scale)
            output[:, heads, rows], lse[:, heads, rows] = found
        return output, lse

    def outlines(self, tensors):
        query = tensors[0]
        return query.new_empty(query.shape), query.new_empty(query.shape[:3])

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # what is added up is not rounded
    def gradients(self, tensors, output, kept, output_gradient, wanted):
        scores = Scores.of(*tensors, self._is_causal, self._scale)
        attended = Attended(output, kept, output_gradient)
        gradients = Gradients(scores, attended)
        if 3 in wanted:
            gradients.add_all_with_bias(self._is_causal, tensors[3])
        else:
            for piece in _pieces(scores, _ROWS):  # all rows are one task there
                gradients.add(*piece)
        found = gradients.of_inputs(tensors)
        return [found[place] for place in wanted]


def _pieces(scores: Scores, rows_a_task: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yields for which heads, rows and columns to call torch's kernel.

    Args:
        scores: All scores.
        rows_a_task: How many rows of one head a thread takes.
    """
    batch, heads, rows, _ = scores.query.shape
    # So many heads a call that no thread is idle.
    tasks = batch * -(-_ROWS // rows_a_task)
    together = -(-torch.get_num_threads() // tasks)
    for row, ranges in zip(range(0, rows, _ROWS), _ranges(scores), strict=True):
        here = slice(row, min(row + _ROWS, rows))
        blocks = []
        for head in range(0, heads, together):
            starts, ends = zip(*ranges[head : head + together], strict=True)
            columns = min(starts), max(ends)
            if blocks and blocks[-1][1] == columns:
                head = blocks.pop()[0]
            blocks.append((head, columns))
        stops = [head for head, _ in blocks[1:]] + [heads]
        for (head, columns), stop in zip(blocks, stops, strict=True):
            yield slice(head, stop), here, slice(*columns)


def _ranges(scores):
    """Returns for every slice of the rows and every head the first column that matters,
    and the one after the last, in steps."""
    along = scores.along
    along = torch.where(along.isnan(), torch.inf, along)  # never left out
    rows, columns = scores.query.shape[2], scores.key.shape[2]
    lowest = _lowest_that_matters(scores)
    # The first and the last diagonal with a bias that is not lower than that.
    first = torch.searchsorted(along.cummax(1).values, lowest)
    last = torch.searchsorted(along.flip(1).cummax(1).values, lowest)
    last = along.shape[1] - 1 - last
    starts = torch.arange(0, rows, _ROWS, device=lowest.device)
    ends = (starts + _ROWS).clamp(max=rows)
    first, last = first - ends + 1, last - starts + 1
    first = (first // _STEP * _STEP).clamp(0, columns - 1)
    last = (-(-last // _STEP) * _STEP).clamp(max=columns).maximum(first + 1)
    return torch.stack([first, last], -1).transpose(0, 1).tolist()


def _lowest_that_matters(scores):
    """Returns the lowest bias of a key that may matter, `(N, slices)`."""
    query, key, _, along, scale = scores
    rows, columns = query.shape[2], key.shape[2]
    row = torch.arange(rows, device=query.device)
    column = (columns - 1 - row).clamp(min=0)  # the own key's, or the last key's
    own = (query * key[:, :, column]).sum(-1) * scale
    most = query.norm(dim=-1) * key.norm(dim=-1).amax(-1, keepdim=True)
    margin = own - most * (abs(scale) * (1 + ROUNDING))
    lowest = margin.amin(0) + along[:, row + column] + NEGLIGIBLE
    missing = -rows % _ROWS
    lowest = functional.pad(lowest, (0, missing), value=torch.inf)
    lowest = lowest.unflatten(1, (-1, _ROWS)).amin(-1)
    # Where nothing is known all may matter but what is hidden, by minus infinity.
    least = torch.finfo(lowest.dtype).min
    return lowest.nan_to_num(least, neginf=least)
