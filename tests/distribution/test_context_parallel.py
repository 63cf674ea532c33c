"""Sequences shared by two processes in torch's `context_parallel`, over loopback."""

import keras
import numpy as np
import pytest

from tests.distribution.pairs import run_pair_once

if keras.backend.backend() != "torch":
    pytest.skip("speaks of the PyTorch backend", allow_module_level=True)
experimental = pytest.importorskip(
    "torch.distributed.tensor.experimental", exc_type=ImportError
)
if not hasattr(experimental, "context_parallel"):
    pytest.skip("this torch has no context_parallel", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    module = "tests.distribution.context_parallel_worker"
    return run_pair_once(module, tmp_path_factory)


@pytest.mark.parametrize(
    "case",
    [
        "self-attention",
        "long",
        "grouped heads",
        "another value width",
        "rotary with ids",
    ],
)
def test_two_processes_give_the_numbers_of_one(folder, case):
    found = np.load(folder / f"{case}.npz")
    assert "error" not in found, found["error"]
    for name in found:
        if name.startswith("expected"):
            continue
        expected = found[f"expected_{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            found[name] / scale, expected / scale, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("alibi", "bias"),
        ("bias", "bias"),
        ("dropout", "dropout"),
        ("soft cap", "soft cap"),
        ("sink", "sink"),
        ("window", "mask"),
        ("long window", "mask"),
        ("mask", "mask"),
        ("scores", "scores"),
        ("reference", "asked for"),
        ("rotary", "`position_ids` must be given"),
    ],
)
def test_a_call_that_would_see_a_part_only_is_refused(folder, case, why):
    message = str(np.load(folder / f"{case}.npz").get("error", "no error"))
    assert "context_parallel" in message
    assert why in message.split("Received: a call")[-1]
