"""What `python -m keras_mha info` finds, and processes on other backends."""

import importlib.metadata
import sys

import keras
import pytest

import keras_mha
from keras_mha import info

pytestmark = pytest.mark.once

CURRENT = keras.backend.backend()


def test_installed_backend_has_its_version():
    module = __import__(CURRENT)
    assert info.backend_version(CURRENT) == module.__version__


def test_missing_backend_has_no_version():
    assert info.backend_version("backend_that_is_not_there") is None


def test_leftover_folder_is_no_backend(monkeypatch, tmp_path):
    (tmp_path / "leftover_backend").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert info.backend_version("leftover_backend") is None


def test_backend_from_a_package_of_another_name(monkeypatch, tmp_path):
    (tmp_path / "some_backend").mkdir()
    (tmp_path / "some_backend" / "__init__.py").write_text("")
    metadata = tmp_path / "some_backend_cpu-1.2.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: some-backend-cpu\nVersion: 1.2.3\n")
    (metadata / "top_level.txt").write_text("some_backend\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert info.backend_version("some_backend") == "1.2.3"


def test_backend_without_any_package_is_still_found(monkeypatch, tmp_path):
    (tmp_path / "bare_backend.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert info.backend_version("bare_backend") == "(no version)"


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Writes the source of a module that only this process's `sys.path` leads to."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "child_module.py").write_text(source)
        return "child_module"

    return write


def test_process_runs_on_the_backend_it_is_given(module):
    source = "import os, sys; print(os.environ['KERAS_BACKEND'], *sys.argv[1:])"
    assert info.run_under("jax", module(source), "one", "two") == "jax one two\n"
    assert info.run_under("torch", module(source)) == "torch\n"


def test_process_can_show_its_output(module, capfd):
    assert info.run_under(CURRENT, module("print('shown')"), show=True) == ""
    assert capfd.readouterr().out == "shown\n"


def test_process_finds_this_package_from_any_folder(module, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "json.py").write_text("raise RuntimeError('the wrong json')")
    monkeypatch.chdir(folder)
    source = "import importlib.util, json; print(importlib.util.find_spec('keras_mha'))"
    assert keras_mha.__file__ in info.run_under(CURRENT, module(source))


def test_failed_process_shows_its_error(module):
    with pytest.raises(info.ChildProcessFailed) as failure:
        info.run_under(CURRENT, module("raise RuntimeError('this went wrong')"))
    assert f"child_module failed on the {CURRENT} backend" in str(failure.value)
    assert "this went wrong" in str(failure.value)


def test_attention_choices_are_implementations_and_reasons():
    choices = info.attention_choices()
    assert choices["T=4096, scores"][0] == "reference"
    for implementation, reason in choices.values():
        assert implementation in ("fused", "blockwise", "reference")
        assert reason


def test_report_of_the_versions_and_the_current_backend(monkeypatch):
    version = info.backend_version(CURRENT)
    monkeypatch.setattr(
        info, "backend_version", {CURRENT: version}.get
    )  # the others would be two more processes
    report = info.report()
    assert f"keras_mha   {keras_mha.__version__}" in report
    assert f"keras       {keras.__version__}, on {CURRENT}" in report
    assert f"numpy       {importlib.metadata.version('numpy')}" in report
    assert f"python      {sys.version.split()[0]}" in report
    assert f"{CURRENT:<12}{version}\n" in report
    assert f"devices   {', '.join(info.devices())}" in report
    assert f"attention of 8 heads of 64, on a {info.device_kind().upper()}" in report
    assert info.device_kind() in ("cpu", "gpu", "tpu", "other")
    for call, (implementation, reason) in info.attention_choices().items():
        assert f"{call:<24}{implementation:<11}{reason}" in report


def test_report_names_the_extra_of_a_missing_backend(monkeypatch):
    monkeypatch.setattr(info, "backend_version", lambda backend: None)
    assert 'jax         not installed: pip install "keras-mha[jax]"' in info.report()


def test_report_of_a_broken_backend_shows_its_error(monkeypatch):
    def fail(*arguments):
        raise info.ChildProcessFailed("no module named jaxlib")

    monkeypatch.setattr(info, "backend_version", {"jax": "1.0"}.get)
    monkeypatch.setattr(info, "run_under", fail)
    assert "1.0, but no module named jaxlib" in info.report()
