"""torch's CPU kernel with a sink: a rescaling by the rows' sums.

A sink is one more logit in a row's softmax, which has no value. With the logarithm of
the row's sum of exponentials that the kernel returns,

    lse'   = log(exp(lse) + exp(sink))
    output = output_without * exp(lse - lse')

and the kernel's gradient, given `output` and `lse'` for its own, is that of query, key
and value. The sink has a weight of `exp(sink - lse')`, and a value of zero:

    d_sink = sum over rows of -exp(sink - lse') * (d_output . output)

References:
    Xiao et al., 2024, Efficient streaming language models with attention sinks:
        https://arxiv.org/abs/2309.17453
"""

import torch

from keras_mha._keras import Tensor
from keras_mha.kernels.backends.torch import is_computed_now
from keras_mha.kernels.backends.torch_differentiable import of_formula
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.torch_kernels import flash_cpu


def takes(call: AttentionCall) -> bool:
    """Whether this way is open to a call with a sink and without dropout."""
    if call.has_bias or call.scale <= 0 or not is_computed_now(call.query):
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
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    sink = call.sink.expand(query.shape[1])
    return _Attention.apply(call.mask is not None, call.scale, query, key, value, sink)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, is_causal, scale, query, key, value, sink):
        options = {"is_causal": is_causal, "scale": scale}
        output, lse = flash_cpu.forward(query, key, value, None, **options)
        joined = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
        share = torch.exp(lse - joined)[..., None]
        output = (output * share).to(query.dtype)
        ctx.options = options
        ctx.save_for_backward(query, key, value, sink, output, joined)
        return output

    @staticmethod
    def backward(ctx, output_gradient):
        *inputs, output, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            formula = _Formula(**ctx.options)
            return None, None, *of_formula(formula, inputs, output_gradient)
        query, key, value, sink = inputs
        given = output_gradient, query, key, value, output, lse, None
        found = flash_cpu.backward(*given, **ctx.options)
        products = output_gradient.to(lse.dtype) * output.to(lse.dtype)
        weights = torch.exp(sink.to(lse.dtype)[:, None] - lse)
        d_sink = -(weights * products.sum(-1)).sum((0, 2))
        return None, None, *found, d_sink.to(sink.dtype)


class _Formula:
    """The same by operations that have every derivative."""

    def __init__(self, is_causal: bool, scale: float):
        self._is_causal, self._scale = is_causal, scale

    def __call__(self, query, key, value, sink):
        logits = query @ key.mT * self._scale
        if self._is_causal:
            hidden = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        column = sink.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        weights = torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1]
        return weights @ value
