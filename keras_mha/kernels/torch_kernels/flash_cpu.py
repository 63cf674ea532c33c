"""torch's fused kernel for CPUs by its own name, with the logarithms of the rows' sums.

`scaled_dot_product_attention` calls it and keeps these to itself. With them gradients
can be taken for some columns at a time: a column's weight needs nothing of the others.
PyTorch does not promise to keep the operators: `IS_THERE` says whether they are there
and do what is asked of them.
"""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from keras_mha._keras import Tensor
from keras_mha.kernels.backends.torch import splits_sequences
from keras_mha.kernels.backends.torch_differentiable import takes_formula
from keras_mha.kernels.call import AttentionCall
from keras_mha.masks import is_plain_causal


def takes(call: AttentionCall) -> bool:
    """Whether a call without dropout may be given to these operators, whatever else it
    adds to its scores."""
    if not IS_THERE or call.device_kind != "cpu" or 0 in call.scores_shape:
        return False
    if not (call.mask is None or is_plain_causal(call.mask)):
        return False
    if any(hasattr(x, "placements") for x in (call.query, call.key, call.value)):
        return False  # processes share them
    if takes_formula() or splits_sequences():
        return False
    # There others look at each operation, perhaps of tensors without numbers.
    return torch.compiler.is_compiling() or not is_in_torch_dispatch_mode()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends.

    Args:
        query: Shape `(B, N, T, H)`.
        key: Shape `(B, N, S, H)`.
        value: Shape `(B, N, S, H)`.
        bias: Shape `(1, N, T, S)`, of any strides but the last, which is 1.
        scale: Factor of the dot products.
        is_causal: Whether keys after the query are hidden.

    Returns:
        The output, `(B, N, T, H)`, and the logarithms of the rows' sums of
        exponentials, `(B, N, T)`.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def backward(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value.

    Args:
        output_gradient: That of the output.
        query: As of `forward`.
        key: As of `forward`, or some of the columns.
        value: As of `forward`, or some of the columns.
        output: What `forward` returned for all columns.
        lse: What `forward` returned for all columns.
        bias: As of `forward`, for these columns.
        scale: As of `forward`.
        is_causal: As of `forward`.
    """
    pull_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = output_gradient, query, key, value, output, lse, 0.0, is_causal
    return pull_back(*given, attn_mask=bias, scale=scale)


def _works() -> bool:
    """Tries both in a small example, with a bias that overlaps itself in memory."""
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value, along = (
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        for shape in ((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), (2, 7))
    )
    bias = along.unfold(1, 5, 1)[None]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        logits = query @ key.mT * 0.3 + bias
        expected = torch.softmax(logits, -1) @ value
        gradients = torch.autograd.grad(expected, inputs, torch.ones_like(expected))
    query, key, value = (x.detach() for x in inputs)
    try:
        output, lse = forward(query, key, value, bias, 0.3)
        ones = torch.ones_like(output)
        found = backward(ones, query, key, value, output, lse, bias, 0.3)
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = expected, logits.logsumexp(-1), *gradients
    pairs = zip((output, lse, *found), expected, strict=True)
    return all(torch.allclose(x, y, atol=1e-4) for x, y in pairs)


with torch.inference_mode(False):
    IS_THERE = _works()
