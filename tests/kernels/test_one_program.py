"""Calls run eagerly on JAX are one program, which is kept for the calls like them."""

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import masks
from keras_mha.kernels import backends, reference
from tests.helpers import only_jax, to_numpy, to_tensor


def padding(*lengths):
    return masks.Padding(to_tensor(np.arange(6) < np.array(lengths)[:, None]))


def segments(size):
    return masks.Segments(to_tensor(np.arange(12).reshape(2, 6) // size))


class EvenKeys(masks.Mask):
    """A user's mask that works its booleans out by NumPy."""

    def allowed(self, rows, columns):
        return np.asarray(rows) * 0 + np.asarray(columns) % 2 == 0


# Two calls each that differ in their tensors alone. Of a number of heads that no other
# test has: what other tests had compiled would be kept.
ALIKE = {
    "plain": [{}, {}],
    "causal": [{"mask": masks.Causal()}, {"mask": masks.Causal()}],
    "padding": [{"mask": padding(3, 6)}, {"mask": padding(5, 0)}],
    "segments": [{"mask": segments(3)}, {"mask": segments(2)}],
    "causal segments": [{"mask": masks.Causal() & segments(n)} for n in (2, 3)],
    "booleans": [{"mask": np.tri(6, k=k, dtype=bool)} for k in (0, 1)],
    "dropout": [{"dropout": 0.3, "seed": seed} for seed in (1, 2)],
    "sink": [{"sink": 0.5}, {"sink": -0.5}],
    "talking heads": [
        {"talking_heads": (None, scale * np.eye(7, dtype="float32"))}
        for scale in (1, 2)
    ],
}
# And two each that differ in more, or are not known to differ in less.
UNLIKE = {
    "scales": [{"scale": 0.11}, {"scale": 0.12}],
    "a function of the user's": [
        {"mask": masks.Where(lambda i, j: i != j)},
        {"mask": masks.Where(lambda i, j: i == j)},
    ],
    "a mask of the user's": [{"mask": EvenKeys()}, {"mask": EvenKeys()}],
    "offsets": [{"mask": masks.Causal(1)}, {"mask": masks.Causal(2)}],
    "position biases": [{"position_bias": keras_mha.ALiBi(7).bias()}] * 2,
}


@pytest.fixture
def runs(monkeypatch):
    """Counts how often whole scores are worked out, or written into a program."""
    found, attend_rows = [], reference.attend_rows

    def counted(*arguments):
        found.append(arguments)
        return attend_rows(*arguments)

    monkeypatch.setattr(reference, "attend_rows", counted)
    return found


@pytest.fixture
def arrays():
    return np.random.default_rng(0).normal(size=(3, 2, 6, 7, 4))


def attend(arrays, options):
    query, key, value = map(to_tensor, arrays)
    return to_numpy(
        keras_mha.dot_product_attention(
            query, key, value, implementation="reference", **options
        )
    )


@only_jax
@pytest.mark.parametrize("case", ALIKE)
def test_one_program_runs_all_calls_that_differ_in_their_tensors(case, runs, arrays):
    first, second = (attend(arrays, options) for options in ALIKE[case])
    assert len(runs) == 1
    assert case in ("plain", "causal") or not np.allclose(first, second)


@only_jax
@pytest.mark.parametrize("case", UNLIKE)
def test_other_calls_are_worked_out_by_themselves(case, runs, arrays):
    for options in UNLIKE[case]:
        attend(arrays, options)
    assert len(runs) == 2


@pytest.mark.parametrize("case", [*ALIKE, *UNLIKE])
def test_a_program_finds_what_its_operations_find(case, arrays, monkeypatch):
    found = [attend(arrays, options) for options in (ALIKE | UNLIKE)[case]]
    monkeypatch.setattr(backends.current(), "is_better_as_program", lambda: False)
    expected = [attend(arrays, options) for options in (ALIKE | UNLIKE)[case]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_scores_and_sums_come_out_of_a_program_too(arrays, monkeypatch):
    def found():
        return keras_mha.dot_product_attention(
            *map(to_tensor, arrays), return_scores=True, return_lse=True
        )

    results = found()
    monkeypatch.setattr(backends.current(), "is_better_as_program", lambda: False)
    assert len(results) == 3
    for x, y in zip(results, found(), strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=1e-5, atol=1e-6)


@only_jax
def test_a_gradient_is_of_one_program(runs, arrays):
    import jax

    def loss(query, key, value):
        return keras_mha.dot_product_attention(query, key, value, scale=0.13).sum()

    for scale in (1.0, 2.0):
        jax.grad(loss, argnums=(0, 1, 2))(*map(to_tensor, scale * arrays))
    assert len(runs) == 1


@only_jax
def test_no_program_outlives_the_distribution_that_it_is_for(runs, arrays):
    attend(arrays, {"scale": 0.14})
    devices = keras.distribution.DeviceMesh((1,), ("batch",), ["cpu:0"])
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices))
    try:
        attend(arrays, {"scale": 0.14})
    finally:
        keras.distribution.set_distribution(None)
    assert len(runs) == 2
