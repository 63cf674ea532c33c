"""Products of whole scores, by every equation that the formula is written with."""

import numpy as np
import pytest
from keras import ops

from keras_mha.kernels import backends

LENGTHS = {"b": 2, "t": 3, "s": 5, "k": 2, "g": 3, "n": 4, "h": 7, "v": 4, "d": 6}


@pytest.mark.parametrize(
    ("x", "y", "result"),
    [
        ("btnh", "bsnh", "bnts"),
        ("btkgh", "bskh", "bkgts"),
        ("bnts", "bsnv", "btnv"),
        ("bkgts", "bskv", "btkgv"),
        ("bnd", "bsd", "bns"),
        ("bns", "bsd", "bnd"),
    ],
)
@pytest.mark.parametrize("keys", [1, 5, 9])  # fewer than features, and more
@pytest.mark.parametrize("lead", ["b", "..."])
def test_products_are_those_of_einsum(x, y, result, keys, lead):
    lengths = LENGTHS | {"s": keys}
    random = np.random.default_rng(0).normal
    arrays = [
        random(size=[lengths[axis] for axis in axes]).astype("float32")
        for axes in (x, y)
    ]
    equation = f"{x},{y}->{result}"
    found = backends.current().product(
        equation.replace("b", lead), *map(ops.convert_to_tensor, arrays)
    )
    wanted = np.einsum(equation, *arrays)
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, atol=1e-5)
