"""The notebooks that are kept hold what they showed, and nothing of a machine."""

import nbformat
import pytest

from notebooks.execute import NOTEBOOKS
from tests.notebooks.notebooks import code_cells

pytestmark = pytest.mark.once


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_cell_was_run_in_order(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_it_is_small_and_names_no_machine(path):
    text = path.read_text()
    assert len(text) < 1_500_000
    for place in ("/home", "/tmp", "/work", "/root", "site-packages"):
        assert place not in text
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.display_name == "Python 3"
