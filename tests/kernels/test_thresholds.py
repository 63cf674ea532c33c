"""From how many scores on tiles are better may differ by kind of call."""

import keras
import pytest

from keras_mha.kernels import backends, thresholds
from keras_mha.kernels.call import AttentionCall
from keras_mha.kernels.few_scores import FewScores
from keras_mha.masks import Causal, SlidingWindow
from keras_mha.ops.planner import plan

TABLE = {"plain": 10, "causal": 20, "dropout": 30, "grouped": 40, "masked": 50}


def a_call(groups=4, **arguments):
    query, key = (keras.KerasTensor((2, 5, heads, 8)) for heads in (4, groups))
    return AttentionCall(query, key, key, device="cpu", **arguments)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, "plain"),
        ({"mask": SlidingWindow(3)}, "masked"),
        ({"mask": Causal(1)}, "masked"),
        ({"mask": Causal()}, "causal"),
        ({"groups": 2}, "grouped"),
        ({"groups": 2, "mask": Causal()}, "grouped"),
        ({"dropout": 0.1, "groups": 2, "mask": Causal()}, "dropout"),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "nothing",
)
def test_a_backend_may_have_a_number_for_each_kind_of_call(
    monkeypatch, arguments, kind
):
    monkeypatch.setattr(backends.current(), "FEW_SCORES", TABLE)
    assert thresholds.few_scores_of(a_call(**arguments)) == TABLE[kind]


def test_a_backend_may_have_one_number_for_all(monkeypatch):
    monkeypatch.setattr(backends.current(), "FEW_SCORES", 7)
    for arguments in ({}, {"mask": Causal()}, {"dropout": 0.1}, {"groups": 2}):
        assert thresholds.few_scores_of(a_call(**arguments)) == 7


def test_the_planner_goes_by_the_number_of_the_kind(monkeypatch):
    monkeypatch.setattr(backends.current(), "FEW_SCORES", TABLE)  # a call has 25
    assert plan(a_call(dropout=0.1)).implementation == "reference"
    monkeypatch.setattr(backends.current(), "FEW_SCORES", TABLE | {"dropout": 25})
    assert plan(a_call(dropout=0.1)).implementation == "blockwise"


def test_numbers_of_kinds_are_of_kinds_that_there_are():
    few = backends.current().FEW_SCORES
    assert not isinstance(few, dict) or few.keys() == TABLE.keys()


@pytest.mark.parametrize(
    ("sequences", "number"), [(0, 100), (1, 100), (10, 90), (30, 30), (100, 20)]
)
def test_a_number_may_follow_from_all_heads_and_sequences(
    monkeypatch, sequences, number
):
    few = FewScores(in_all=900, least=20, most=100)
    for given in (few, TABLE | {"plain": few}):
        monkeypatch.setattr(backends.current(), "FEW_SCORES", given)
        assert thresholds.few_scores("cpu", sequences) == number
