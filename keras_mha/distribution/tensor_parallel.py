"""The heads of a model's attention layers shared by processes, on PyTorch."""

from typing import Any

import keras

from keras_mha.distribution import torch_models


def parallelize(model: Any, device_mesh: Any, model_axis: str | None = None) -> Any:
    """Has processes share the heads of a model's attention layers (PyTorch).

    Tensor parallel as in Megatron-LM: each process computes some of the heads of every
    `keras_mha.MultiHeadAttention`, and the output projection's sums are summed over the
    processes. The weights become DTensors in place: those of heads are shared out, as
    `layout_map` shares them on JAX, and the few others whole. Outside of these layers
    nothing changes: they take and give plain tensors, whole on each process, and the
    model's other weights stay as they are. All processes must call the model with the
    same batch.

    Key heads that are too few for the processes are whole on each. Losses, gradients
    and what dropout drops are those of one process. At first all processes get the
    weights and seeds of the first one.

    Make the optimizer afterwards, of `model.parameters()`: one of torch's. Keras's own
    cannot update DTensors, so `fit` cannot train such a model. To save or to load one,
    see `keras_mha.distribution.gathered`.

    Args:
        model: A Keras model or layer, or a `torch.nn.Module` with Keras layers in it.
            They must be built.
        device_mesh: A `torch.distributed.device_mesh.DeviceMesh`.
        model_axis: Name of the mesh's axis along which heads are shared. May be left
            out of a mesh with one axis.

    Returns:
        The model.

    Raises:
        TypeError: If `device_mesh` is none.
        ValueError: If the mesh has no such axis; if heads do not divide by the
            processes along it; if there is no attention layer, it is not built, or has
            what cannot be shared (talking heads, regularizers, int8).

    Example:

    >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    >>> model = keras_mha.distribution.parallelize(model, mesh)
    >>> optimizer = torch.optim.AdamW(model.parameters())

    References:
        Shoeybi et al., 2019, Megatron-LM: https://arxiv.org/abs/1909.08053
    """
    import torch  # noqa
    from keras_mha.distribution import torch_share
    from keras_mha.layers.multi_head_attention import MultiHeadAttention
    mesh = device_mesh if model_axis is None else device_mesh[model_axis]
    layers = [x for x in torch_models.layers_in(model) if isinstance(x, MultiHeadAttention)]
    for layer in layers:
        torch_share.check(layer, mesh)
    torch_models.take_from_first(model, mesh)
    for layer in layers:
        layer._share = torch_share.Share(layer, mesh)
    torch_models.track_again(model)
    return model
