"""torch's fused kernel, on the whole call or on slices of its rows.

The kernel knows no mask, the causal one, or one of T x S numbers, in which it skips
nothing. So where the mask is another, it is called for some rows at a time, with the
keys from the first to the last that any of them may see and a mask of this size only.
(Learned keys, which all see, are put beside these.) On a CPU biases that follow from
the distance alone, and sinks, have ways of their own: `diagonals`, `sinks`.
"""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional  # looked into when called: others replace what is there

from keras_mha._keras import Tensor
from keras_mha.kernels.backends.torch import is_exporting, splits_sequences
from keras_mha.kernels.backends.torch_differentiable import (
    differentiable,
    of_formula,
    takes_formula,
)
from keras_mha.kernels.backends.torch_operators import as_node
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.dropout import DrawnSeed, OfPart, SeedOfHeads, seed_of
from keras_mha.kernels.masking import allowed_pairs, bias_block, whole
from keras_mha.kernels.parts import join_tensors, split_tensors
from keras_mha.kernels.torch_kernels import diagonals, sinks
from keras_mha.kernels.torch_kernels.seeded import is_held, number_of, seeded
from keras_mha.masks import (
    Tile,
    hidden_rows_apart,
    is_alike_for_all_rows,
    is_plain_causal,
)
from keras_mha.memory_columns import MaskBesideMemory

# Rows of a slice. Measured on a CPU: with fewer the calls cost more, with more the keys
# that only some of the rows may see. Other devices want more work at once.
_ROWS, _ROWS_ELSEWHERE = 128, 1024
_WHOLE = 512  # Up to so many rows one call is not slower than slices.


def refusal(call: AttentionCall) -> str | None:
    """Returns why torch's kernel cannot run this call, or `None` if it can."""
    if call.dropout > 0 and (why_not := refusal_of_dropout(call)) is not None:
        return why_not
    if call.logit_soft_cap is not None:
        return "the fused kernel has no soft cap"
    if call.sink is not None and not sinks.takes(call):
        return "the fused kernel has no sink"
    # For a few rows torch itself takes another path, with all scores.
    if _is_bias_trained(call) and not (_is_short(call) or _sums_diagonals(call)):
        return "torch's kernel has no gradient of a bias"
    if torch.jit.is_tracing() and call.query.shape[2] != call.key.shape[2]:
        return "ONNX knows torch's kernel with as many key heads as query heads only"
    return None


def refusal_of_dropout(call: AttentionCall) -> str | None:
    """Returns why torch's kernel cannot drop weights in this call, or `None`.

    On a GPU the seed decides by way of torch's own generator. On a CPU torch has no
    fused kernel with dropout, and our tiles drop by the seed alone.
    """
    if call.device_kind != "gpu":
        return "the fused kernel's dropout does not follow the layer's seed"
    if call.dropout >= 1:
        return "dropout=1 leaves nothing to be computed"
    if takes_formula():
        return "the fused kernel's dropout has no derivatives beyond the gradient"
    if is_exporting():
        return "an exported program has not the seed of the fused kernel's dropout"
    if not _drops_all_heads(call):
        return "heads that processes share drop what they do among all heads"
    if splits_sequences():
        return "processes that share sequences drop what they do among all weights"
    if isinstance(call.query, torch.Tensor) and is_held(call.query.device):
        return "a CUDA graph that is recorded holds the fused kernel's random state"
    if torch.compiler.is_compiling() and _is_bias_trained(call):
        return "the fused kernel, compiled with dropout, has no gradient of a bias"
    return None


def _is_bias_trained(call):
    if not call.has_bias:
        return False
    weights = (call.bias, *split_tensors(call.position_bias)[1])
    return any(getattr(weight, "requires_grad", False) for weight in weights)


def _sums_diagonals(call):
    """Whether a trained bias is one whose gradient is summed along diagonals."""
    return diagonals.takes(call) and call.position_bias.reach is not None


def _drops_all_heads(call):
    """Whether the call's heads and tokens are all that its seed is for."""
    seed = call.seed
    is_part = isinstance(seed, SeedOfHeads)
    if isinstance(seed, DrawnSeed):
        is_part = isinstance(seed.pair, OfPart) or tuple(seed.pair.shape) != (2,)
    tensors = call.query, call.key, call.value
    return not is_part and not any(hasattr(x, "placements") for x in tensors)


def refusal_of_parts(call: AttentionCall) -> str | None:
    """Returns why torch's `context_parallel` cannot join what the processes attend to,
    or `None` if it can."""
    if call.has_bias or not (call.mask is None or _is_causal(call)):
        return "it knows no bias, and no mask but the causal one"
    return None


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    # Rows that see nothing are as cheap computed as not, and a mask of T x S numbers,
    # which they alone would need, is not.
    hidden, mask = hidden_rows_apart(call.mask)
    if not hidden:
        return _attend(call)
    output = _attend(replace(call, mask=mask))
    seen = [part.block(whole(call)).transpose(1, 2) for part in hidden]
    return torch.where(functools.reduce(torch.logical_and, seen), output, 0.0)


def _attend(call):
    dtype = _dtype(call)
    query, key, value = (
        x.to(dtype).transpose(1, 2) for x in (call.query, call.key, call.value)
    )
    width, value_width = query.shape[3], value.shape[3]
    if width != value_width:
        # Only of one width does the kernel take them; zeros change no product.
        most = max(width, value_width)
        query, key, value = (
            functional.pad(x, (0, most - x.shape[3])) for x in (query, key, value)
        )
    if not _is_short(call):
        # For many rows each head's in a piece is faster, for few the copies cost more.
        query, key, value = (x.contiguous() for x in (query, key, value))
    kernel = _kernel_of_rows_sums(call)
    if kernel is not None:
        output = kernel.attend(call, query, key, value)
        return output[..., :value_width].transpose(1, 2).to(call.query.dtype)
    seed = seed_of(call) if call.dropout else None
    if torch.compiler.is_compiling() and call.dropout:
        output = _as_node(call, query, key, value, seed)
    else:
        output = _attend_seeded(call, query, key, value, seed)
    if output.shape[3] != value_width:
        output = output[..., :value_width]
    return output.transpose(1, 2).to(call.query.dtype)


def _kernel_of_rows_sums(call):
    """Returns what attends by what the kernel knows of rows' sums, where that is needed
    or faster."""
    if call.sink is not None:
        return sinks
    if call.has_bias and not _is_short(call) and diagonals.takes(call):
        return diagonals
    return None


def _attend_seeded(call, query, key, value, seed):
    number = None if seed is None else number_of(seed)
    if not is_one_call(call) and not takes_formula():
        return _attend_slices(call, query, key, value, number)
    if number is None:
        return _attend_slice(call, _whole(query, key), query, key, value)
    with seeded(query.device, number):
        return _attend_slice(call, _whole(query, key), query, key, value)


def _dtype(call: AttentionCall) -> torch.dtype:
    """The kernel takes one for all: a float32 bias is not cut down to a half type."""
    if not call.has_bias:
        return call.query.dtype
    held = (call.bias, *split_tensors(call.position_bias)[1])
    dtype = call.query.dtype if call.position_bias is None else torch.float32
    for x in held:
        if x is not None and x.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, x.dtype)
    return torch.promote_types(call.query.dtype, dtype)


def _is_short(call: AttentionCall) -> bool:
    if is_exporting():  # neither slices nor lengths to compare there
        return True
    rows = call.query.shape[1]
    return rows is not None and rows <= _WHOLE


def is_one_call(call: AttentionCall) -> bool:
    """Whether torch's kernel is called once, and with no mask made for it alone."""
    return _is_short(call) or _one_call_does(call)


def _one_call_does(call: AttentionCall) -> bool:
    """Whether the whole call needs no mask of T x S numbers, or has one anyway."""
    if call.position_bias is not None:
        return False
    if call.mask is None or _is_causal(call):
        return True
    return call.bias is None and is_alike_for_all_rows(call.mask)


def _is_causal(call: AttentionCall) -> bool:
    # With a negative scale torch's own causal mask gives NaN; one of booleans does not.
    return not call.has_bias and call.scale > 0 and is_plain_causal(call.mask)


_UNKNOWN = (
    "A gradient of attention with dropout is to be differentiated again, and which "
    "weights the GPU's kernel dropped is not known then. Call the layer with "
    "`flash_attention=False` (`dot_product_attention` with "
    "`implementation='blockwise'` or 'reference'), whose dropout is a formula."
)


class _Slice(NamedTuple):
    """Some rows, and the keys that they may see.

    Args:
        tile: The rows, and the columns from the first to the last that any may see.
        before: Of the scores' first columns, how many all see that are not in the tile.
    """

    tile: Tile
    before: int = 0

    @property
    def ranges(self) -> tuple[slice, Any]:
        """What indexes the rows, and the columns."""
        tile = self.tile
        rows = slice(tile.row, tile.row + tile.rows)
        start, end = tile.column, tile.column + tile.columns
        if self.before == 0 or self.before == start:
            return rows, slice(start - self.before, end)
        return rows, [*range(self.before), *range(start, end)]


def _whole(query, key):
    return _Slice(Tile(0, query.shape[2], 0, key.shape[2], whole=True))


def _attend_slice(call, part, query, key, value):
    """Attends from the rows to the columns; tensors are `(B, heads, ...)`."""
    causal = part.tile.whole and _is_causal(call)
    mask, seen = (None, None) if causal else _torch_mask(call, part)
    output = _torch_attention(query, key, value, mask, causal, call)
    return output if seen is None else torch.where(seen, output, 0.0)


def _torch_attention(query, key, value, mask, causal, call):
    """Calls torch's kernel, and sees to the derivatives that it has not."""
    options = {"is_causal": causal, "scale": call.scale}
    if query.shape[1] != key.shape[1]:
        if _leaves_threads_idle(query, key, value):
            shared_by = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared_by, 1) for x in (key, value))
        else:
            options["enable_gqa"] = True

    def formula(query, key, value, mask=mask):
        if call.dropout:
            raise RuntimeError(_UNKNOWN)
        # What torch's function itself takes where no kernel fits.
        attend = torch.ops.aten._scaled_dot_product_attention_math
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
        return attend(query, key, value, attn_mask=mask, **options)[0]

    if takes_formula() and not splits_sequences():
        return formula(query, key, value)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=call.dropout, **options
    )
    if not output.requires_grad or is_exporting() or splits_sequences():
        return output
    if mask is not None and mask.requires_grad:
        return differentiable(formula, output, query, key, value, mask)
    return differentiable(formula, output, query, key, value)


def _leaves_threads_idle(query, key, value):
    """Whether a copy of the keys for each query head pays: torch's gradient, on a CPU,
    gives each thread whole key heads, of which there may be too few to go round."""
    if query.device.type != "cpu" or is_exporting() or splits_sequences():
        return False
    trained = any(x.requires_grad for x in (query, key, value))
    if not (trained and torch.is_grad_enabled() and key.shape[2] > _WHOLE):
        return False
    batch, heads, shared_by = len(key), key.shape[1], query.shape[1] // key.shape[1]
    threads = _thread_count()
    # How many query heads the busiest thread has.
    as_shared = math.ceil(batch * heads / threads) * shared_by
    return as_shared > math.ceil(batch * heads * shared_by / threads)


@torch._dynamo.assume_constant_result
def _thread_count():
    return torch.get_num_threads()


def _torch_mask(call, part):
    """Returns torch's `attn_mask` and which rows see any key at all.

    A row that sees none is opened to all keys, so that no softmax is taken over
    nothing, and its output is set to zero afterwards, which also stops its gradients.
    """
    bias = bias_block(call, part.tile)
    allowed = allowed_pairs(call, part.tile, bias)
    if part.before:
        bias, allowed = (
            x if x is None else functional.pad(x, (part.before, 0), value=front)
            for x, front in ((bias, 0.0), (allowed, True))
        )
    if allowed is None:
        return None if bias is None else bias.to(_dtype(call)), None
    seen = allowed.any(dim=-1, keepdim=True)
    if bias is None:
        if _are_all(seen):
            return allowed, None
        return allowed | ~seen, seen
    dtype = _dtype(call)
    if call.bias is not None:
        # Finite, since a float32 bias may be out of the range of float16.
        lowest = max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)
        bias = bias.clamp(min=lowest)
    bias = bias.to(dtype)
    hidden = torch.where(seen, -torch.inf, 0.0).to(dtype)
    return torch.where(allowed, bias, hidden), seen


def _are_all(seen):
    """Whether all are known to be `True`, where that costs nothing to know."""
    is_number = type(seen) is torch.Tensor and seen.device.type == "cpu"
    if not is_number or torch.compiler.is_compiling() or is_exporting():
        return False
    return not takes_formula() and bool(seen.all())


def _attend_slices(call, query, key, value, number):
    if torch.compiler.is_compiling():
        return _as_node(call, query, key, value)
    return _Slices.apply(call, number, query, key, value)


def _as_node(call, query, key, value, seed=None):
    """Writes the call into a program that is compiled, in slices or in one."""
    mask, tensors = split_tensors(call.mask)
    position_bias, held = split_tensors(call.position_bias)
    biases = () if call.bias is None else (call.bias,)
    seeds = () if seed is None else (seed,)
    rest = mask, len(tensors), position_bias, len(held), len(biases)
    # Nothing but these three gets a gradient from slices.
    given = [query, key, value]
    given += [x.detach() for x in (*tensors, *held, *biases, *seeds)]
    arguments = (*rest, call.scale, call.dropout, call.device)
    return as_node(_SlicesNode, arguments, given, reads_numbers=seed is not None)


class _SlicesNode:
    """Slices as a kernel for `torch_operators`."""

    def __init__(
        self,
        mask,
        mask_count,
        position_bias,
        position_count,
        bias_count,
        scale,
        dropout,
        device,
    ):
        self._mask, self._position_bias = mask, position_bias
        counts = 3, mask_count, position_count, bias_count
        self._ends = [*itertools.accumulate(counts)]
        self._options = {"scale": scale, "dropout": dropout, "device": device}

    def _call(self, tensors):
        """Returns the call, and what its dropout is seeded with."""
        ends = [*self._ends, len(tensors)]
        held, others, bias, seed = (tensors[a:b] for a, b in itertools.pairwise(ends))
        call = AttentionCall(
            *(x.transpose(1, 2) for x in tensors[:3]),
            mask=join_tensors(self._mask, held),
            position_bias=join_tensors(self._position_bias, others),
            bias=bias[0] if bias else None,
            **self._options,
        )
        return call, number_of(seed[0]) if seed else None

    def attend(self, tensors):
        output = _sliced(*self._call(tensors), *tensors[:3])
        return output, output.new_empty(0)

    def outlines(self, tensors):
        query, _, value = tensors[:3]
        output = query.new_empty(*query.shape[:3], value.shape[3])
        return output, query.new_empty(0)

    def gradients(self, tensors, output, kept, output_gradient, wanted):
        call, number = self._call(tensors)
        found = _sliced_gradients(call, number, tensors[:3], output_gradient)
        return [found[place] for place in wanted]


class _Slices(torch.autograd.Function):
    """Keeps nothing for the gradient but the inputs: each slice is run again."""

    @staticmethod
    def forward(ctx, call, number, query, key, value):
        ctx.call, ctx.number = call, number
        ctx.save_for_backward(query, key, value)
        return _sliced(call, number, query, key, value)

    @staticmethod
    def backward(ctx, output_gradient):
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            found = of_formula(
                lambda *inputs: _attend_slice(ctx.call, _whole(*inputs[:2]), *inputs),
                inputs,
                output_gradient,
            )
            return None, None, *found
        found = _sliced_gradients(ctx.call, ctx.number, inputs, output_gradient)
        return None, None, *found


def _sliced(call, number, query, key, value):
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    with seeded(query.device, number):
        for part in _slices(call):
            rows, columns = part.ranges
            output[:, :, rows] = _attend_slice(
                call, part, query[:, :, rows], key[:, :, columns], value[:, :, columns]
            )
    return output


def _sliced_gradients(call, number, inputs, output_gradient):
    # Of half types the slices' parts are added up in float32.
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    gradients = [torch.zeros_like(x, dtype=dtype) for x in inputs]
    # The slices in their order again: with the same seed they drop the same weights.
    with seeded(inputs[0].device, number):
        for part in _slices(call):
            rows, columns = part.ranges
            ranges = (rows, columns, columns)
            cut = [
                x[:, :, r].detach().requires_grad_()
                for x, r in zip(inputs, ranges, strict=True)
            ]
            with torch.enable_grad():
                output = _attend_slice(call, part, *cut)
            found = torch.autograd.grad(output, cut, output_gradient[:, :, rows])
            for gradient, r, added in zip(gradients, ranges, found, strict=True):
                gradient[:, :, r] += added
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]


def _slices(call):
    """Yields for every slice of the rows the keys that they may see."""
    rows, columns = call.query.shape[1], call.key.shape[1]
    if is_one_call(call):
        yield _Slice(Tile(0, rows, 0, columns, whole=True))
        return
    step = _ROWS if call.device_kind == "cpu" else _ROWS_ELSEWHERE
    learned = call.mask.count if type(call.mask) is MaskBesideMemory else 0
    for row in range(0, rows, step):
        tile = Tile(row, min(step, rows - row), learned, columns - learned)
        if call.mask is None:
            yield _Slice(tile)
            continue
        first = _first_live(call.mask, tile, forward=True)
        if first is not None:
            last = _first_live(call.mask, tile, forward=False)
            columns_seen = last.column + last.columns - first.column
            tile = tile._replace(column=first.column, columns=columns_seen)
            yield _Slice(tile, learned)
        elif learned:
            yield _Slice(tile._replace(column=0, columns=learned))


def _first_live(mask, tile, forward):
    """Returns the narrow tile nearest to one end that the mask does not call empty."""
    if mask.status(tile) == "empty":
        return None
    if tile.columns <= _ROWS:
        return tile
    half = tile.columns // 2
    halves = (
        tile._replace(columns=half),
        tile._replace(column=tile.column + half, columns=tile.columns - half),
    )
    for part in halves if forward else reversed(halves):
        if (found := _first_live(mask, part, forward)) is not None:
            return found
    return None
