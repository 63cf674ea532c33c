"""cuDNN's attention, for half types on NVIDIA's GPUs."""

from keras_mha.kernels.call import AttentionCall


def refusal(call: AttentionCall) -> str | None:
    """Returns why cuDNN cannot run this call, or `None` if it can."""
    return "cuDNN is not asked yet"
