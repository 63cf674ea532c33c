"""Dropout's random bits: the same for everyone who asks, and random enough."""

from __future__ import annotations

import numpy as np
import pytest

from keras_mha.kernels import backends, dropout
from keras_mha.masks import Tile
from tests.helpers import only_jax, only_tensorflow, to_numpy, to_tensor


def kept(rate=0.5, seed=(1, 2), heads=3, rows=64, columns=64, row=0, column=0):
    """Booleans (heads, rows, columns): which weights stay."""
    head_index = to_tensor(np.arange(heads, dtype="int32").reshape(-1, 1, 1))
    bits = dropout.kept(
        to_tensor(np.array(seed, "int32")),
        rate,
        head_index,
        Tile(row, rows, column, columns),
    )
    ones = to_tensor(np.ones((heads, rows, columns)))
    return to_numpy(backends.current().keep(ones, bits)) != 0


def expected_kept(rate, seed, heads, rows, columns):
    """The published definition in NumPy, whose int32 wraps around as it must."""

    def mixed(x):
        x = (x ^ (x >> 16)) * np.int32(0x7FEB352D)
        return (x ^ (x >> 15)) * np.array(0x846CA68B, "uint32").astype("int32")

    head, row, column = np.ogrid[:heads, :rows, :columns]
    head, row, column = (x.astype("int32") for x in (head, row, column))
    first, second = np.array(seed, "int32")
    start = mixed(mixed(head * np.int32(0x5BD1E995) + first) + second)
    start = mixed(start + row * np.int32(0x1B873593))
    step = mixed(start + np.int32(0x2C1B3C6D)) * np.int32(2) + np.int32(1)
    numbers = mixed((column + start) * step).astype("int64")
    return numbers >= round(rate * 2**32) - 2**31


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("seed", [(1, 2), (-7, 2**31 - 1)])
def test_every_backend_keeps_what_the_definition_keeps(rate, seed):
    np.testing.assert_array_equal(
        kept(rate, seed), expected_kept(rate, seed, 3, 64, 64)
    )


def test_a_tile_holds_the_bits_of_the_whole():
    whole = kept(rows=100, columns=90)
    tile = kept(row=37, rows=20, column=11, columns=33)
    np.testing.assert_array_equal(tile, whole[:, 37:57, 11:44])


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_kept(rate):
    found = 1 - kept(rate, heads=4, rows=512, columns=512).mean()
    assert abs(found - rate) < 5 * np.sqrt(rate * (1 - rate) / 2**20)


@pytest.mark.parametrize("rate", [1e-12, 1 - 1e-12])
def test_rates_at_the_ends_stay_in_range(rate):
    assert kept(rate).mean() == pytest.approx(1 - rate, abs=1e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2, 16])
def test_neighbours_are_independent(axis, step):
    # 2^19 pairs: a correlation of 0.007 is five standard deviations.
    signs = 2.0 * kept(heads=32, rows=128, columns=128) - 1
    shifted = np.roll(signs, step, axis)
    assert abs((signs * shifted).mean()) < 0.007


def test_seeds_are_independent():
    first = 2.0 * kept(seed=(1, 2), rows=512, columns=512) - 1
    for seed in [(2, 2), (1, 3), (2, 1)]:
        other = 2.0 * kept(seed=seed, rows=512, columns=512) - 1
        assert abs((first * other).mean()) < 0.006


@only_jax
def test_eagerly_the_bits_come_of_one_program(monkeypatch):
    head_index = to_tensor(np.zeros((1, 1), "int32"))

    def kept():
        seed = to_tensor(np.array([3, 4], "int32"))
        return to_numpy(dropout.kept(seed, 0.25, head_index, Tile(0, 7, 0, 9)))

    first = kept()
    monkeypatch.setattr(dropout, "_mixed", None)  # no Python is run again
    np.testing.assert_array_equal(kept(), first)


def test_many_bits_are_those_of_the_definition():
    given = {"rate": 0.1, "seed": (5, -6), "heads": 2, "rows": 384, "columns": 400}
    np.testing.assert_array_equal(kept(**given), expected_kept(**given))


@only_tensorflow
@pytest.mark.parametrize(
    ("heads", "length", "is_compiled"),
    [(2, 512, True), (2, 16, False), (None, 512, False)],
    ids=["many", "few", "of an unknown number of heads"],
)
def test_many_bits_come_of_one_compiled_program(heads, length, is_compiled):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((heads, 1, 1), tf.int32)])
    def bits(head_index):
        tile = Tile(0, length, 0, length)
        return dropout.kept(tf.constant([1, 2]), 0.5, head_index, tile)

    operations = bits.get_concrete_function().graph.get_operations()
    calls = [x for x in operations if "PartitionedCall" in x.type]
    assert [x.get_attr("_XlaMustCompile") for x in calls] == [True] * is_compiled


@only_tensorflow
def test_many_lengths_are_not_warned_of(caplog):
    for rows in range(520, 530):
        kept(heads=1, rows=rows, columns=512)
    assert "retracing" not in caplog.text
