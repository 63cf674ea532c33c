"""Weights that processes share, together for a while, on PyTorch."""

import contextlib
from collections.abc import Iterator
from typing import Any

from keras_mha.distribution.tensor_parallel import check_backend


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Has a model's variables give their whole values, to save or to load them.

    For models that `parallelize` or `fully_shard` has changed, whose weights each
    process has a part of. In this context they are plain tensors, whole on each
    process, so that `get_weights`, `save_weights` and `load_weights` work; what they
    hold at its end is shared out again. All processes must enter it.

    A model that is loaded first and shared then needs none of this.

    Args:
        model: The model, or any layer of it.

    Yields:
        Nothing.

    Example:

    >>> with keras_mha.distribution.gathered(model):
    ...     if torch.distributed.get_rank() == 0:
    ...         model.save_weights("model.weights.h5")
    """
    check_backend("gathered")
    from keras_mha.distribution import torch_models

    torch_models.check_module("model", model)
    with torch_models.gathered(model):
        yield
