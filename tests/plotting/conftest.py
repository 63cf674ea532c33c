"""For the tests of pictures."""

import numpy as np
import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def nothing_left_in_pyplot():
    """No picture opens a figure that someone would have to close."""
    before = pyplot.get_fignums()
    yield
    assert pyplot.get_fignums() == before


@pytest.fixture
def weights():
    """Makes attention weights of any shape, causal if asked for."""

    def make(*shape, causal=False):
        logits = np.random.default_rng(0).normal(size=shape)
        if causal:
            logits = np.where(np.tri(*shape[-2:], dtype=bool), logits, -np.inf)
        exponentials = np.exp(logits)
        return exponentials / exponentials.sum(-1, keepdims=True)

    return make


@pytest.fixture
def panels():
    """Finds a figure's panels, without the bar that explains the colours."""

    def find(figure):
        return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]

    return find
