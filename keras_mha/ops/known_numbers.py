"""Looks at a tensor's numbers where there are any yet."""

import numpy as np

from keras_mha._keras import Tensor
from keras_mha.kernels import backends


def known_numbers(x: Tensor) -> np.ndarray | None:
    """Returns the numbers of a tensor.

    Args:
        x: A tensor.

    Returns:
        A NumPy array; `None` while a compiler is only writing the program that will
        work them out.
    """
    return backends.current().known(x)
