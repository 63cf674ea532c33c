"""Sequences shared by two processes in torch's `context_parallel`, over loopback."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("speaks of the PyTorch backend", allow_module_level=True)
experimental = pytest.importorskip(
    "torch.distributed.tensor.experimental", exc_type=ImportError
)
if not hasattr(experimental, "context_parallel"):
    pytest.skip("this torch has no context_parallel", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
# The processes speak over loopback, whatever the machine's name leads to.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context_parallel")
    command = [sys.executable, "-m", "tests.distribution.context_parallel_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(folder)],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), **LOOPBACK},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    return folder


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
