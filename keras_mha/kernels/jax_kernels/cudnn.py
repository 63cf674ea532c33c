"""Attention by cuDNN's kernel on NVIDIA's GPUs, for half types.

The kernel knows causal masks, windows to the left, and how many keys a sequence has. A
mask of all pairs it takes as numbers that are added to the scores, which are T x S. So
every other mask is said in another way:

- Keys that are hidden from all queries alike (padding), where their order says nothing:
  those that are seen are put first, and counted.
- The same where it does: heads get one more feature, which is `a` in every query, 0 in
  a key that is seen and `-b` in one that is not, whose other features are 0. With a
  score of minus some millions, `-scale * a * b`, the weight of a hidden key is exactly
  0, as long as one of the others is above; and to their scores exactly 0 is added.
- Where heads are too wide for one more: those that are seen are counted if they are the
  first, which is looked at when the program runs; else tiles run.
- Booleans that the caller gave for all pairs become a bias. A bias that is given masks
  itself, with all that the other masks hide, as low as that may be.
- Queries that see nothing are found beforehand: cuDNN's numbers of such rows are not
  looked at, and its gradient gets a sum there against which all weights are 0.

A sink joins the softmax afterwards, of which the rows' sum is all that is to be known;
with it the sum, the kernel's gradient is that of the softmax with the sink.

References:
    Dao, 2023, FlashAttention-2: https://arxiv.org/abs/2307.08691
"""

from typing import Any

import jax

from keras_mha._keras import Tensor, dtype_name
from keras_mha.kernels import blockwise
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.jax_kernels import cudnn_machine, cudnn_primitives
from keras_mha.kernels.jax_kernels.cudnn_arguments import (
    MASKED,
    arguments_of,
    way_to_hide,
)
from keras_mha.kernels.jax_kernels.layout import (
    finished,
    for_gradient,
    gradient_of_sink,
)
from keras_mha.kernels.jax_kernels.mask_parts import dense_shape, named, parted
from keras_mha.kernels.problem import MIXES_HEADS, Problem, undivided

# A bias's gradient makes cuDNN hold numbers of half a type for the scores of all heads
# and rows of the batch. Up to so many bytes they may be more than the bias has.
_FEW_BYTES = 2**28

NAME = "cuDNN"


def refusal(call: AttentionCall) -> str | None:
    """Returns why cuDNN's kernel cannot run this call, or `None` if it can."""
    return (
        _refusal_of_options(call)
        or _refusal_of_tensors(call)
        or _refusal_of_mask(call)
        or _refusal_of_bias(call)
        or cudnn_primitives.refusal()
        or cudnn_machine.refusal()
    )


def _refusal_of_options(call):
    if call.mixes_heads:
        return MIXES_HEADS
    if call.return_lse:
        return "cuDNN's kernel has no gradient of the rows' sums"
    if call.dropout > 0:
        return "cuDNN's dropout does not follow the layer's seed"
    if call.logit_soft_cap is not None:
        return "cuDNN's kernel has no soft cap"
    if call.position_bias is not None:
        return "a position's bias is made tile by tile, and cuDNN takes it whole"
    return undivided(call)


def _refusal_of_tensors(call):
    if dtype_name(call.query) not in MASKED:
        return "cuDNN's kernel takes float16 and bfloat16 only"
    batch, *shape = call.query.shape
    numbers = (*shape, *call.key.shape[1:], call.value.shape[3], batch or 1)
    if not all(isinstance(number, int) for number in numbers):
        return "cuDNN's kernel takes lengths that are numbers"
    widest = cudnn_machine.widest()
    if max(call.query.shape[3], call.value.shape[3]) > widest:
        return f"cuDNN's kernel takes heads up to a width of {widest} here"
    return None


def _refusal_of_mask(call):
    rows, columns = call.query.shape[1], call.key.shape[1]
    parts = parted(call.mask, rows, columns)
    if parts.segments or parts.rest:
        kind = named(*(parts.segments + parts.rest)[:1])
        return f"{kind} would be T x S numbers for cuDNN's kernel"
    if parts.window is not None:
        if call.bias is not None or parts.dense:
            return "cuDNN's kernel takes no window beside a bias or booleans"
        if rows > columns:
            return "cuDNN's windows take no more queries than keys"
    if parts.keys:
        width, has_bias = call.query.shape[3], call.bias is not None
        if way_to_hide(parts, has_bias, width, call.scale) is None:
            return (
                "with these widths and this scale cuDNN's kernel hides no keys beside "
                "a window or booleans"
            )
    return None


def _refusal_of_bias(call):
    if call.bias is None:
        return None
    if dtype_name(call.bias) != dtype_name(call.query):
        return "cuDNN's kernel takes no bias of more precision than the query"
    if dtype_name(call.bias) == "float16":
        return "in float16 a bias that masks cannot be told from a low one by cuDNN"
    shape = tuple(call.bias.shape)
    if shape[2:] != call.scores_shape[2:]:
        return "a bias that broadcasts would be T x S numbers for cuDNN's kernel"
    parts = parted(call.mask, *call.scores_shape[2:])
    hidden = [dense_shape(mask) for mask in parts.dense]
    if parts.keys:
        hidden.append((call.scores_shape[0], 1))
    pairs = (pair for each in hidden for pair in zip(each[:2], shape[:2], strict=True))
    if any(wanted not in (1, given) for wanted, given in pairs):
        return "with what the mask hides the bias would have more numbers than given"
    return None


def forward(problem: Problem, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        problem: What is to be computed.
        tensors: As of `blockwise.forward`.

    Returns:
        The output, shape `(B, K, V, G, T)`, and the logarithm of each row's sum of
        exponentials, shape `(B, K, 1, G, T)`, infinite where a row sees nothing.
    """
    arguments = arguments_of(problem, tensors)
    return _if_it_holds(
        arguments.holds,
        lambda: _forward(arguments, tensors),
        lambda: blockwise.forward(problem, tensors),
    )


def _if_it_holds(holds, function, otherwise):
    return function() if holds is None else jax.lax.cond(holds, function, otherwise)


def _forward(arguments, tensors):
    output, sums = cudnn_primitives.attend(
        arguments.kernel,
        *arguments.arrange(tensors["query"], tensors["key"], tensors["value"]),
        arguments.arrange_bias(tensors.get("bias")),
        arguments.lengths,
    )
    _, groups, width, _ = tensors["value"].shape
    rows = tensors["query"].shape[4]
    output, sums = output[:, :rows, :, :width], sums[..., :rows]
    return finished(output, sums, arguments.seen, tensors.get("sink"), groups)


def backward(
    problem: Problem,
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
    if "bias" in problem.differentiable and not _holds_scores_for_bias(tensors):
        return blockwise.backward(problem, tensors, output, lse, d_output)
    arguments = arguments_of(problem, tensors)
    return _if_it_holds(
        arguments.holds,
        lambda: _backward(arguments, problem, tensors, output, lse, d_output),
        lambda: blockwise.backward(problem, tensors, output, lse, d_output),
    )


def _backward(arguments, problem, tensors, output, lse, d_output):
    of_bias = "bias" in problem.differentiable
    tokens = tensors["query"], tensors["key"], tensors["value"]
    tokens, back = jax.vjp(arguments.arrange, *tokens)
    if of_bias:
        bias, bias_back = jax.vjp(arguments.arrange_bias, tensors["bias"])
    else:
        bias = arguments.arrange_bias(tensors.get("bias"))
    _, length, _, width = tokens[0].shape
    gradients = cudnn_primitives.pull_back(
        arguments.kernel,
        *tokens,
        bias,
        arguments.lengths,
        *for_gradient(output, lse, d_output, arguments.seen, length, width),
        of_bias=of_bias,
    )
    found = dict(zip(("query", "key", "value"), back(gradients[:3]), strict=True))
    if of_bias:
        (found["bias"],) = bias_back(gradients[3])
    if "sink" in problem.differentiable:
        found["sink"] = gradient_of_sink(tensors["sink"], output, lse, d_output)
    return {
        name: found[name].astype(tensors[name].dtype) for name in problem.differentiable
    }


def _holds_scores_for_bias(tensors):
    """Whether cuDNN may hold numbers of all scores for the gradient of a bias."""
    batch, groups, _, shared, rows = tensors["query"].shape
    scores = batch * groups * shared * rows * tensors["key"].shape[3]
    return scores == tensors["bias"].size or 2 * scores <= _FEW_BYTES
