"""Which of PyTorch's kernels runs a call.

`scaled_dot_product_attention` takes what it can do alone: no mask, the causal one, few
rows, dropout. On NVIDIA's GPUs `flex_attention`, where its compiler is there, takes
what needs another mask, and soft caps, sinks and what learns in a bias.
"""

from keras_mha._keras import Tensor
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.torch_kernels import sdpa

refusal_of_parts = sdpa.refusal_of_parts

SDPA, FLEX = "scaled_dot_product_attention", "flex_attention"


def choose(call: AttentionCall) -> tuple[str | None, str]:
    """Returns the name of PyTorch's kernel for a call, `None` if none can run it, and
    why."""
    why_not, flex_why_not = _refusals(call)
    if flex_why_not is None:
        why_not = why_not or "masks of all scores would be needed otherwise"
        return FLEX, f"{why_not}; torch's flex_attention runs the call, compiled"
    if why_not is None:
        return SDPA, "the backend's own kernel can run the call"
    if flex_why_not is _ELSEWHERE:
        return None, why_not
    return None, f"{why_not}, and {flex_why_not}"


def attend(call: AttentionCall) -> Tensor:
    """Returns the output, shape `(B, T, N, V)`."""
    if call.device_kind != "gpu" or _refusals(call)[1] is not None:
        return sdpa.attend(call)
    from keras_mha.kernels.torch_kernels import flex

    return flex.attend(call)


_ELSEWHERE = "flex_attention is taken on NVIDIA's GPUs"
_NOT_NEEDED = "the other kernel does as well"


def _refusals(call: AttentionCall) -> tuple[str | None, str | None]:
    """Returns why not `scaled_dot_product_attention`, and why not `flex_attention`."""
    why_not = sdpa.refusal(call)
    if call.device_kind != "gpu":
        return why_not, _ELSEWHERE
    if why_not is None and sdpa.is_one_call(call):
        return why_not, _NOT_NEEDED
    from keras_mha.kernels.torch_kernels import flex  # heavy, and not there everywhere

    return why_not, flex.refusal(call)
