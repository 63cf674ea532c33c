"""The command line: arguments, exit codes and what they say."""

import keras
import pytest

from keras_mha import demo, info
from keras_mha.__main__ import main

pytestmark = pytest.mark.once

CURRENT = keras.backend.backend()


def refusal(arguments, capsys):
    """The message of a command line that is wrong usage."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def demo_arguments(monkeypatch):
    """Has `main` hand over what the demo would run with, instead of running it."""
    received = {}

    def run(backend, epochs, output, seed):
        received.update(backend=backend, epochs=epochs, output=output, seed=seed)
        return 0

    monkeypatch.setattr(demo, "run", run)
    return received


def test_demo_takes_its_options(demo_arguments, tmp_path):
    options = ["--backend", CURRENT, "--epochs", "3", "--seed", "7"]
    assert main(["demo", *options, "--output", str(tmp_path)]) == 0
    assert demo_arguments == {
        "backend": CURRENT,
        "epochs": 3,
        "output": tmp_path,
        "seed": 7,
    }


def test_demo_trains_on_the_current_backend_by_default(demo_arguments):
    assert main(["demo"]) == 0
    assert demo_arguments["backend"] == CURRENT


def test_unknown_backend_is_wrong_usage(capsys):
    message = refusal(["demo", "--backend", "theano"], capsys)
    assert "argument --backend: unknown backend 'theano'" in message
    assert "expected one of tensorflow, jax, torch" in message


def test_backend_that_is_not_installed_names_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(info, "backend_version", lambda backend: None)
    message = refusal(["demo", "--backend", "jax"], capsys)
    assert "argument --backend: jax is not installed" in message
    assert 'pip install "keras-mha[jax]"' in message


def test_default_backend_is_checked_too(monkeypatch, capsys):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    assert "unknown backend 'numpy'" in refusal(["demo"], capsys)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--epochs", "0", "expected an integer from 1"),
        ("--epochs", "few", "expected an integer from 1"),
        ("--seed", "-1", "expected an integer from 0"),
        ("--seed", "4294967296", "to 4294967295"),
    ],
)
def test_wrong_number_is_wrong_usage(option, value, expected, capsys):
    message = refusal(["demo", f"{option}={value}"], capsys)
    assert f"argument {option}: got '{value}'" in message
    assert expected in message


def test_output_that_is_a_file_is_wrong_usage(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    message = refusal(["demo", "--output", str(file)], capsys)
    assert "argument --output" in message
    assert "expected a folder" in message


def test_no_command_is_wrong_usage(capsys):
    assert "required: command" in refusal([], capsys)


def test_missing_extra_is_one_line_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(demo.REQUIREMENTS, "module_that_is_not_there", "scikit-learn")
    assert main(["demo", "--output", str(tmp_path / "output")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "scikit-learn" in message
    assert 'pip install "keras-mha[demo]"' in message
    assert not (tmp_path / "output").exists()


def test_failed_training_shows_its_error_and_is_exit_code_1(
    monkeypatch, tmp_path, capsys
):
    def fail(*arguments, **options):
        raise info.ChildProcessFailed("out of digits")

    monkeypatch.setattr(info, "run_under", fail)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "out of digits" in capsys.readouterr().err


def test_info_prints_the_report(monkeypatch, capsys):
    monkeypatch.setattr(info, "report", lambda: "what there is")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "what there is\n"
