"""What layers need of tensors and `keras.ops` does not give."""

from typing import Any

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


def is_read_by_compiler() -> bool:
    """Whether a compiler reads the Python that runs now, as `torch.compile` does, which
    knows no NumPy; others run it, with placeholders for tensors."""
    return backends.current().is_read_by_compiler()


def is_computed_now(x: Tensor) -> bool:
    """Whether operations on a tensor are run one by one as Python comes to them, and
    no program is being written."""
    return backends.current().is_computed_now(x)


def is_better_multiplied(x: Tensor) -> bool:
    """Whether `multiplied` is better than a call of the layer that does the same."""
    return backends.current().is_better_multiplied(x)


def is_called_plainly(layer: Any) -> bool:
    """Whether nobody has asked the backend to watch, or change, calls of a layer."""
    return backends.current().is_called_plainly(layer)


def multiplied(x: Tensor, kernel: Tensor, bias: Tensor | None, axes: int) -> Tensor:
    """Returns `x . kernel + bias`, summed over some axes.

    Args:
        x: Shape `(*lead, *summed)`.
        kernel: Shape `(*summed, *out)`, of the same dtype.
        bias: Shape `out`; `None` for none.
        axes: How many axes are summed over.

    Returns:
        Shape `(*lead, *out)`.
    """
    return backends.current().multiplied(x, kernel, bias, axes)


def constant(numbers: Any, dtype: str | None = None) -> Tensor:
    """Returns numbers that are known beforehand, of an array or a tuple, as a tensor,
    in a way that every compiler can read."""
    return backends.current().constant(numbers, dtype)


def columns_at(x: Tensor, index: Tensor) -> Tensor:
    """Returns `x[:, index]`.

    Args:
        x: Shape `(N, M)`.
        index: Which of the M columns, whole numbers of any shape.

    Returns:
        Shape `(N, *index.shape)`.
    """
    return backends.current().columns_at(x, index)


def plain(x: Tensor) -> Tensor:
    """Returns the tensor that a variable of the backend's own (not Keras's) holds now.

    Some of `keras.ops` take TensorFlow's variables for tensors and then fail.
    """
    return backends.current().plain(x)


def splits_sequences() -> bool:
    """Whether each process sees a part of the sequences, unknown to its program, as in
    torch's `context_parallel`."""
    return backends.current().splits_sequences()


def devices_along(x: Tensor, axis: int) -> int:
    """Returns over how many devices an axis is sharded that must divide evenly, as with
    torch's DTensor; 1 where it is whole."""
    return backends.current().devices_along(x, axis)


def distributed(x: Tensor, axes: tuple[str | None, ...]) -> Tensor:
    """Returns `x` shared out under the distribution that is set in Keras.

    Args:
        x: A tensor.
        axes: Along which axis of the distribution's mesh each of its axes is shared;
            `None` for whole. One that does not divide evenly stays whole.
    """
    return backends.current().distributed(x, axes)


def take_along_axis(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Returns, along one axis, the elements of `x` at these places.

    Args:
        x: Any shape.
        index: Whole numbers, of the shape of `x` but for this axis; others may be 1.
        axis: The axis.
    """
    return backends.current().take_along_axis(x, index, axis)


def with_one_replaced(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Returns `x` with one element of each row of the batch replaced.

    `x` stays as it is; a compiler that sees that nobody needs it any more writes in
    place. (Keras's own `scatter_update` has not always left it alone.)

    Args:
        x: Shape `(B, L, ...)`.
        index: Which element of each row, whole numbers of shape `(B,)`.
        new: Shape `(B, ...)`.
    """
    return backends.current().with_one_replaced(x, index, new)


def are_taken_over(*layers: Any) -> bool:
    """Whether the weights of one of these layers are what `fully_shard` of torch's has
    put in the place of those that it was made with."""
    return backends.current().are_taken_over(*layers)
