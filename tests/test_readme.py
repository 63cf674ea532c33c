"""Every code block of the README runs as it stands there.

Python blocks run one after another, as a reader types them in; a block that begins with
a comment naming a file is a script, which the shell blocks then run.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "shell"]
COMMANDS = [line for code in SHELL for line in code.splitlines()]
# Peers, which the oldest Keras's environment has not; their blocks stand alone.
MISSING = [
    f"from {package} import"
    for package in ("flax", "transformers")
    if importlib.util.find_spec(package) is None
]
SCRIPT = re.compile(r"# (\w+\.py)\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that a reader is in, after all Python blocks were run."""
    folder = tmp_path_factory.mktemp("readme")
    before, names = Path.cwd(), {}
    os.chdir(folder)
    try:
        for number, code in enumerate(PYTHON, start=1):
            if any(peer in code for peer in MISSING):
                continue
            script = SCRIPT.match(code)
            if script:
                (folder / script[1]).write_text(code)
            exec(compile(code, f"README.md, Python block {number}", "exec"), names)
    finally:
        os.chdir(before)
    return folder


def test_the_blocks_are_in_languages_that_these_tests_run():
    assert {language for language, _ in BLOCKS} == {"python", "shell"}
    assert len(PYTHON) > 10 and len(COMMANDS) > 5


def test_the_python_blocks_run(folder):
    assert (folder / "model.keras").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_the_scripts_run_under_the_backend_they_name(folder, command):
    setting, program, *arguments = shlex.split(command)
    name, backend = setting.split("=")
    if backend != keras.backend.backend():
        pytest.skip("its own backend's run covers it")
    assert program == "python"
    environment = {**os.environ, name: backend, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert backend in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip")])
def test_the_install_lines_name_extras_that_there_are(command):
    """Installing is what `make` does; here pip reads the same line and says yes."""
    backend = keras.backend.backend()
    if backend not in command:
        pytest.skip("its own backend's run covers it")
    pip = [sys.executable, "-m", *shlex.split(command)]
    result = subprocess.run(
        [*pip, "--dry-run", "--no-deps", "--no-build-isolation"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_the_make_commands_are_targets(command):
    """`make test` is running this, and `.ci/run` runs both; here they must exist."""
    result = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert command in (ROOT / ".ci/run").read_text()
