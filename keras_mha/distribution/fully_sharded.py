"""A model's weights shared by processes, each with a part of the batch, on PyTorch."""

from typing import Any

from keras_mha.distribution.tensor_parallel import check_backend


def fully_shard(module: Any, **options: Any) -> Any:
    """Shards the weights of Keras layers by torch's `fully_shard` (FSDP2).

    It is called as that is, and does what that does: each process keeps a part of
    every weight, has the whole for as long as a call or its gradient takes, and gets
    its part of the gradient's mean over the processes, which have a part of the batch
    each. But torch's function alone changes nothing for a Keras layer: the layer goes
    on computing with its variables, which are then trained by nobody. With this one
    they follow what torch does. It is for all Keras layers, not attention alone.

    What one call is given is gathered at once. So shard the layers of a model one by
    one, and the model last, which gets what is left. Seeds are not shared.

    Make the optimizer afterwards, of `model.parameters()`, as one of torch's: those of
    Keras, and so `fit`, do not know DTensors. To save and load, see `gathered`.

    Args:
        module: A Keras layer or model, or a `torch.nn.Module` with Keras layers in it.
            It must have its weights.
        **options: As of `torch.distributed.fsdp.fully_shard`: `mesh` and others. For a
            Keras layer `reshard_after_forward` is `True` by default.

    Returns:
        The module.

    Raises:
        TypeError: If `module` is none.
        ValueError: If Keras layers in it are not built, or torch does not find their
            weights.

    Example:

    >>> for layer in model.layers:
    ...     keras_mha.distribution.fully_shard(layer, mesh=mesh)
    >>> keras_mha.distribution.fully_shard(model, mesh=mesh)
    >>> optimizer = torch.optim.AdamW(model.parameters())

    References:
        Zhao et al., 2023, PyTorch FSDP: https://arxiv.org/abs/2304.11277
    """
    check_backend("fully_shard")
    from keras_mha.distribution import torch_fsdp, torch_models

    torch_models.check_module("module", module)
    return torch_fsdp.fully_shard(module, options)
