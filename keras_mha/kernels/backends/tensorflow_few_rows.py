"""Products of few rows in TensorFlow's graphs, with gradients that take less time.

The gradient of `x . kernel` for `x` is a product by the kernel transposed. With few
rows, most of its time goes to bringing the kernel into the order in which it is
multiplied, and from a transposed one that takes up to three times as long. The same
product the other way round, `kernel . gradient^T`, has the kernel as it is.
"""

import math
from typing import Any

import tensorflow as tf

# Up to how many rows are few, and how many numbers a kernel has at least for each: what
# pays on a CPU, measured with 1 to 1024 rows and kernels of 128 x 128 to 1024 x 1024.
_MOST_ROWS = 256
_NUMBERS_A_ROW = 1024


def product(x: Any, kernel: Any) -> Any:
    """Returns `x . kernel` of tensors of shapes `(rows, width)` and `(width, out)`."""
    if _is_of_few_rows(x, kernel):
        return _of_few_rows(x, kernel)
    return tf.matmul(x, kernel)


def _is_of_few_rows(x, kernel):
    # Operation by operation a gradient of one's own costs more time than it gains.
    rows = None if tf.executing_eagerly() else x.shape[0]
    if rows is None or x.dtype != tf.float32:
        return False
    return 1 < rows <= _MOST_ROWS and rows * _NUMBERS_A_ROW <= math.prod(kernel.shape)


@tf.custom_gradient
def _of_few_rows(x, kernel):
    def gradients(output_gradient):
        of_x = tf.matmul(kernel, output_gradient, transpose_b=True)
        of_kernel = tf.matmul(x, output_gradient, transpose_a=True)
        return tf.transpose(of_x), of_kernel

    return tf.matmul(x, kernel), gradients
