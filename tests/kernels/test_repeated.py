"""Tiles that TensorFlow runs eagerly are traced when they come again."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import blockwise, tiling
from tests.helpers import only_tensorflow, to_numpy, to_tensor

pytestmark = only_tensorflow


@pytest.fixture
def traced(monkeypatch):
    """Whether each run of tiles by Python was one that traced a program."""
    from keras_mha.kernels.backends import tensorflow_repeated

    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tensorflow_repeated, "FEWEST_SCORES", 40**2)
    tensorflow_repeated._runner.cache_clear()
    found = []

    def watch(name):
        function = getattr(blockwise, name)

        def watched(problem, tensors, *others):
            import tensorflow as tf

            found.append((name, not tf.executing_eagerly()))
            return function(problem, tensors, *others)

        monkeypatch.setattr(blockwise, name, watched)

    watch("forward")
    watch("backward")
    return found


def attend(numbers, length=40, **options):
    """The output and the query's gradient."""
    import tensorflow as tf

    random = np.random.default_rng(numbers)
    query, key, value = map(to_tensor, random.normal(size=(3, 1, length, 2, 4)))
    with tf.GradientTape() as tape:
        tape.watch(query)
        output = keras_mha.dot_product_attention(
            query, key, value, implementation="blockwise", **options
        )
    return to_numpy(output), to_numpy(tape.gradient(output, query))


ONCE = [("forward", False), ("backward", False)]
TRACED = [("forward", True), ("backward", True)]


@pytest.mark.parametrize("name", ["plain", "causal", "padding", "bias", "dropout"])
def test_a_call_is_traced_when_it_comes_again(name, traced):
    options = {
        "plain": {},
        "causal": {"mask": masks.Causal()},
        "padding": {"mask": masks.Padding(to_tensor(np.arange(40)[None] < 33))},
        "bias": {"position_bias": keras_mha.ALiBi(2).bias()},
        "dropout": {"dropout": 0.5, "seed": 3},
    }[name]
    first = attend(0, **options)
    assert traced == ONCE
    second, third = attend(0, **options), attend(1, **options)
    assert traced == ONCE + TRACED  # of which the third is the second's
    np.testing.assert_allclose(second[0], first[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second[1], first[1], rtol=1e-4, atol=1e-6)
    assert not np.allclose(third[0], first[0])


def test_another_length_or_mask_is_another_call(traced):
    for options in ({}, {"length": 48}, {"mask": masks.Causal()}):
        attend(0, **options)
    assert traced == 3 * ONCE


def test_few_scores_are_not_worth_it(traced):
    for _ in range(3):
        attend(0, length=39)
    assert traced == 3 * ONCE


def test_what_users_wrote_runs_as_they_wrote_it(traced):
    """A mask whose Python asks for numbers, which no program has."""

    @keras.saving.register_keras_serializable("tests")
    def function(rows, columns):
        return columns <= rows if bool(keras.ops.all(rows >= 0)) else rows < 0

    expected, _ = attend(0, mask=masks.Causal())
    traced.clear()
    for _ in range(3):
        found, _ = attend(0, mask=masks.Where(function))
    assert traced == 3 * ONCE
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
