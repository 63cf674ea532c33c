"""What importing the package does, and what its modules may know."""

import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_mha

PACKAGE = Path(keras_mha.__file__).parent
BACKENDS = {"tensorflow", "jax", "torch"}
# Of `distribution`: torch's engines, and how sequences are shared on JAX.
FOR_ONE_BACKEND = ("torch_", "all_to_all", "ring", "shards", "zigzag")


def test_importing_the_package_imports_no_other_backend_and_no_extra():
    code = (
        "import sys, keras; before = set(sys.modules); import keras_mha; "
        "print(*(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    added = {name.partition(".")[0] for name in result.stdout.split()}
    unwanted = {"sklearn", "matplotlib", "rich", *BACKENDS} - {keras.backend.backend()}
    assert not added & unwanted


def test_a_backend_that_is_not_installed_is_named_with_what_to_do():
    hide = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['jax'] = None; "
        "sys.modules['torch'] = None; import keras_mha"
    )
    result = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Keras is set to a backend")
    assert keras.backend.backend() in last and "KERAS_BACKEND" in last


def test_importing_the_package_is_all_that_loading_needs():
    name = "keras_mha>MultiHeadAttention"
    assert keras.saving.get_registered_object(name) is keras_mha.MultiHeadAttention


@pytest.mark.parametrize(
    "module",
    sorted(PACKAGE.rglob("*.py")),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_kernels_import_a_backend(module):
    parts = module.relative_to(PACKAGE).parts
    if "kernels" in parts:
        return
    if parts[0] == "distribution" and parts[-1].startswith(FOR_ONE_BACKEND):
        return  # imported by functions that are for that backend
    # In these functions may, when they are called.
    indent = "" if parts[0] in ("interop", "distribution") else r"\s*"
    imports = rf"^{indent}(?:import|from) (tensorflow|jax|torch)\b"
    assert not re.findall(imports, module.read_text(), re.MULTILINE)


def test_kernels_know_no_layer():
    for module in (PACKAGE / "kernels").rglob("*.py"):
        assert "keras_mha.layers" not in module.read_text()


def test_the_layer_knows_no_kernel():
    for module in (PACKAGE / "layers").glob("*.py"):
        assert "keras_mha.kernels" not in module.read_text()


def test_everything_public_is_documented():
    for name in keras_mha.__all__:
        if name != "__version__":
            assert getattr(keras_mha, name).__doc__.strip(), name
