"""A compiled step writes its token into the cache that it was given."""

import numpy as np
import pytest

import keras_mha
from tests.helpers import only_jax, only_tensorflow, to_numpy, to_tensor

SLOTS = 64


@pytest.fixture(name="layer")
def fixture_layer():
    layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=8)
    layer.build((1, 1, 16))
    return layer


def a_step(layer, batch):
    random = np.random.default_rng(0).normal
    cache = layer.init_cache(batch, SLOTS)
    cache |= {n: to_tensor(random(size=cache[n].shape)) for n in ("key", "value")}
    return to_tensor(random(size=(batch, 1, 16))), cache


def stepped(layer):
    return lambda x, cache: layer(x, cache=cache, use_causal_mask=True)


@only_jax
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_copies_no_cache_that_is_donated(layer, batch):
    import jax

    program = jax.jit(stepped(layer), donate_argnums=1)
    text = program.lower(*a_step(layer, batch)).compile().as_text()
    shape = f"f32[{batch},{SLOTS},2,8]"
    assert shape in text
    copies = [x for x in text.splitlines() if " copy(" in x and f"= {shape}" in x]
    assert not copies


@only_jax
def test_a_compiled_step_has_the_gradient_of_an_eager_one(layer):
    import jax

    x, cache = a_step(layer, 3)

    def loss(x, cache):
        output, new = stepped(layer)(x, cache)
        return (output**2).sum() + (new["key"] ** 2).sum()

    wanted, found = jax.grad(loss)(x, cache), jax.jit(jax.grad(loss))(x, cache)
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), atol=1e-4)
    assert np.abs(to_numpy(found)).max() > 0.1


@only_tensorflow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_moves_no_cache(layer, batch):
    import tensorflow as tf

    step = tf.function(stepped(layer)).get_concrete_function(*a_step(layer, batch))
    moved = [
        operation.inputs[0].shape
        for operation in step.graph.get_operations()
        if operation.type == "Transpose"
    ]
    assert not [shape for shape in moved if SLOTS in shape]
