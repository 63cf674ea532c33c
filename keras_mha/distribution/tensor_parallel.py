"""The heads of a model's attention layers shared by processes, on PyTorch."""

from typing import Any

import keras

from keras_mha.layers.multi_head_attention import MultiHeadAttention


def parallelize(model: Any, device_mesh: Any, model_axis: str | None = None) -> Any:
    """Has processes share the heads of a model's attention layers (PyTorch).

    Tensor parallel as in Megatron-LM: each process computes some of the heads of every
    `keras_mha.MultiHeadAttention`, and what their output projections give is summed
    over the processes. The layers' weights become DTensors, in place: those that belong
    to heads are shared out, as `layout_map` does it on JAX, and the few others are
    whole. The rest of the model stays as it is, and so does what the layers take and
    give: plain tensors, whole on each process. All processes along the axis must call
    the model with the same batch.

    Losses, gradients and what dropout drops are those of one process. Key heads that
    are too few to be shared out are whole on each process, which uses those it needs.
    To begin with, all processes get the weights and the seeds of the first one.

    Make the optimizer afterwards, of `model.parameters()`, as one of torch's: those of
    Keras, and so `fit`, do not know DTensors. To save and load, see `gathered`.

    Args:
        model: A Keras model or layer, or a `torch.nn.Module` with Keras layers in it.
            It must have its weights.
        device_mesh: A `torch.distributed.device_mesh.DeviceMesh`.
        model_axis: Name of the mesh's axis along which heads are shared. May be left
            out if the mesh has one axis only.

    Returns:
        The model.

    Raises:
        TypeError: If `model` or `device_mesh` is none.
        ValueError: If the mesh has no such axis, the heads of a layer cannot be shared
            evenly, there is no such layer, or one has what cannot be shared: talking
            heads, regularizers, or weights that are quantized.

    Example:

    >>> mesh = init_device_mesh("cuda", (8,))
    >>> keras_mha.distribution.parallelize(model, mesh)
    >>> optimizer = torch.optim.AdamW(model.parameters())

    References:
        Shoeybi et al., 2019, Megatron-LM: https://arxiv.org/abs/1909.08053
    """
    check_backend("parallelize")
    from keras_mha.distribution import torch_models, torch_share

    torch_models.check_module("model", model)
    mesh = _axis_of(device_mesh, model_axis)
    layers = [
        layer
        for layer in torch_models.layers_in(model)
        if isinstance(layer, MultiHeadAttention)
    ]
    if not layers:
        raise ValueError(
            "`model` must hold a keras_mha.MultiHeadAttention, whose heads can be "
            "shared; keras_mha.interop.convert_model makes them of Keras's layers. "
            f"Received: a {type(model).__name__} without one"
        )
    for layer in layers:
        torch_share.check(layer, mesh)
    torch_models.take_from_first(model, mesh)
    for layer in layers:
        layer._share = torch_share.Share(layer, mesh)
    torch_models.track_again(model)
    torch_models.refuse_fit(model)
    return model


def check_backend(name: str) -> None:
    """Raises unless the backend is the one that a function is for."""
    backend = keras.backend.backend()
    if backend != "torch":
        raise ValueError(
            f"`{name}` is for the PyTorch backend; on JAX keras.distribution shares "
            "models, with keras_mha.distribution.layout_map. "
            f"Received: the backend {backend!r}"
        )


def _axis_of(device_mesh, name):
    """Returns a mesh's axis of this name as a mesh."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(device_mesh, DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a torch.distributed.device_mesh.DeviceMesh, as "
            "init_device_mesh makes them. Received: "
            f"device_mesh={device_mesh!r} (of type {type(device_mesh).__name__})"
        )
    names = device_mesh.mesh_dim_names or ()
    if name is None and device_mesh.ndim == 1:
        return device_mesh
    if name not in names:
        raise ValueError(
            "`model_axis` must be one of the mesh's axes, along which heads are shared "
            f"(init_device_mesh gives them `mesh_dim_names`): {list(names)}. "
            f"Received: model_axis={name!r}, and a mesh of {device_mesh.ndim} axes"
        )
    return device_mesh[name]
