"""The scripts of the guide to several devices run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/scale.md").read_text("utf-8")
SCRIPTS = {
    heading: script
    for section in PAGE.split("\n## ")[1:]
    for heading in section.splitlines()[:1]
    for script in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}
PRINTED = {
    "JAX: batch and heads": (
        r"attention/query/kernel .*\(None, 'model'",
        r"attention/key/kernel .*\(None, None",
    ),
    "JAX: sequences": (r"all_to_all - .*", r"ring - .*"),
    "JAX: decoding": (r"'batch', None, 'model'.* \[16 16 16 16\]",),
    "JAX: several processes": (r"0 \[(\d.*)\]", r"1 \[(\d.*)\]"),
    "PyTorch": (
        *(r"data parallel \d", r"FSDP2 \d", r"tensor parallel \d"),
        r"context parallel torch.Size\(\[8, 8, 32\]\)",
    ),
    "TensorFlow": (r"\(32, 1\)",),
}


def free_port():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        return waiting.getsockname()[1]


def test_every_engine_has_a_script():
    assert list(SCRIPTS) == list(PRINTED)


@pytest.mark.parametrize("heading", PRINTED)
def test_script_runs(tmp_path, heading):
    for module in ("jax", "torch", "tensorflow"):
        pytest.importorskip(module)
    script = SCRIPTS[heading].replace("12321", str(free_port()))
    (tmp_path / "script.py").write_text(script, "utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, **loopback, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if "has no attribute 'spmd_mode'" in done.stderr:
        pytest.skip("this version of Keras distributes nothing under this JAX")
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in PRINTED[heading]:
        assert re.search(pattern, done.stdout), done.stdout
