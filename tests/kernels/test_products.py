"""Products of whole scores, by every equation that the formula is written with."""

import functools

import numpy as np
import pytest
from keras import ops

from keras_mha.kernels import backends
from tests.helpers import only_jax, only_tensorflow

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


@only_tensorflow
@pytest.mark.parametrize(
    ("lengths", "width", "is_key_first"),
    [
        ((16, 32), 64, True),
        ((33, 16), 64, False),
        ((16, 33), 64, False),
        ((16, 17), 16, False),
        ((None, 16), 64, False),
        ((16, 16), None, False),
    ],
    ids=[
        "short",
        "many queries",
        "many keys",
        "narrow heads",
        "unknown queries",
        "unknown width",
    ],
)
def test_graphs_multiply_keys_of_short_sequences_by_queries(
    lengths, width, is_key_first
):
    import tensorflow as tf

    random = np.random.default_rng(0).normal
    shapes = [(2, length, 3, width) for length in lengths]
    query, key = (
        random(size=[length or 5 for length in shape]).astype("float32")
        for shape in shapes
    )

    @tf.function(input_signature=[tf.TensorSpec(shape) for shape in shapes])
    def product(query, key):
        return backends.current().product("btnh,bsnh->bnts", query, key)

    np.testing.assert_allclose(
        product(query, key), np.einsum("btnh,bsnh->bnts", query, key), atol=1e-5
    )
    operations = product.get_concrete_function().graph.get_operations()
    orders = [
        tuple(tf.get_static_value(operation.inputs[1]))
        for operation in operations
        if operation.type == "Transpose"
    ]
    assert ((0, 1, 3, 2) in orders) == is_key_first
    assert ((0, 2, 3, 1) in orders) != is_key_first
