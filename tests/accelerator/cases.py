"""The calls that are tested: what each is given, and what it says to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_mha import masks
from keras_mha.biases import ByDistance, Slopes
from tests import oracle
from tests.accelerator.device import IS_FORCED
from tests.helpers import to_tensor

# Not too short for a kernel of any device; no multiple of its blocks.
B, T, N, K, H = (1 if IS_FORCED else 2), 600, 4, 2, 64
i, j = np.arange(T)[:, None], np.arange(T)
RNG = np.random.default_rng(0)
VALID = RNG.uniform(size=(B, T)) < 0.7
PACKED = np.sort(RNG.integers(0, 3, size=(B, T)), axis=1)
ON_RIGHT = np.arange(T) < np.linspace(T // 2, T, B, dtype=int)[:, None]
CAUSAL = j <= i


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of call.

    Args:
        mask: Makes the mask.
        booleans: What it says.
        given: Plain options of the call and of the oracle.
        learned: Arrays that are given as tensors and get gradients, and are the
            oracle's too.
        table: What a table of T5's kind is made of.
        bias: What the oracle adds where the call has a position's bias.
        position_bias: Makes that bias of the table.
        groups: Number of key heads.
    """

    mask: Callable[[], Any] = lambda: None
    booleans: np.ndarray = field(default_factory=lambda: np.ones((T, T), bool))
    given: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, np.ndarray] = field(default_factory=dict)
    table: np.ndarray | None = None
    bias: np.ndarray | None = None
    position_bias: Callable[[Any], Any] | None = None
    groups: int = K


SLOPES = tuple(float(x) for x in oracle.alibi_slopes(N))
TABLE = RNG.normal(size=(N, 33))
DISTANCES = np.clip(j - i, -16, 16) + 16

CASES = {
    "plain": Case(),
    "causal": Case(masks.Causal, CAUSAL),
    "causal, as many key heads": Case(masks.Causal, CAUSAL, groups=N),
    "padding": Case(lambda: masks.Padding(to_tensor(VALID)), VALID[:, None, None]),
    "padding on the right, causal": Case(
        lambda: masks.Padding(to_tensor(ON_RIGHT)) & masks.Causal(),
        ON_RIGHT[:, None, None] & CAUSAL,
    ),
    "window": Case(
        lambda: masks.Causal() & masks.SlidingWindow(40), CAUSAL & (i - j < 40)
    ),
    "segments": Case(
        lambda: masks.Segments(to_tensor(PACKED)) & masks.Causal(),
        (PACKED[:, None, :, None] == PACKED[:, None, None, :]) & CAUSAL,
    ),
    "rows that see nothing": Case(
        lambda: masks.Causal(-20) & masks.Padding(to_tensor(VALID)),
        (j <= i - 20) & VALID[:, None, None],
    ),
    "a user's mask": Case(
        lambda: masks.Where(lambda i, j: (i - j) % 2 == 0), (i - j) % 2 == 0
    ),
    "soft cap": Case(masks.Causal, CAUSAL, {"logit_soft_cap": 2.0}),
    "sink": Case(masks.Causal, CAUSAL, learned={"sink": RNG.normal(size=N)}),
    "bias": Case(masks.Causal, CAUSAL, learned={"bias": RNG.normal(size=(1, N, T, T))}),
    "ALiBi": Case(
        masks.Causal,
        CAUSAL,
        bias=oracle.alibi_bias(np.array(SLOPES), np.arange(T), np.arange(T)),
        position_bias=lambda _: Slopes(SLOPES),
    ),
    "T5": Case(
        masks.Causal,
        CAUSAL,
        table=TABLE,
        bias=TABLE[:, DISTANCES][None],
        position_bias=ByDistance,
    ),
}
