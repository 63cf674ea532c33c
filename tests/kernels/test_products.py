"""Products of whole scores, by every equation that the formula is written with."""

import functools

import numpy as np
import pytest
from keras import ops

from keras_mha.kernels import backends
from tests.helpers import only_jax

LENGTHS = {"b": 2, "s": 5, "k": 2, "g": 3, "h": 7, "v": 4, "d": 6}


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
@pytest.mark.parametrize("rows", [3, 600])  # small products, and others
@pytest.mark.parametrize("lead", ["b", "..."])
def test_products_are_those_of_einsum(x, y, result, keys, rows, lead):
    lengths = LENGTHS | {"s": keys, "t": rows, "n": 4 if "t" in x else rows}
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


@only_jax
@pytest.mark.parametrize(
    ("length", "transposed"), [(16, False), (31, False), (32, True)]
)
def test_only_products_that_are_not_small_are_brought_into_order(length, transposed):
    import jax

    x = np.zeros((2, length, 4, 64), "float32")
    product = functools.partial(backends.current().product, "btnh,bsnh->bnts")
    operations = [eqn.primitive.name for eqn in jax.make_jaxpr(product)(x, x).eqns]
    assert (len(operations) > 1) == transposed
