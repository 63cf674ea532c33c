"""What the notebooks' tests share: running one, and reading what its cells showed."""

import base64
import re

import keras

from notebooks.execute import executed


def run_quickly(path, folder):
    """Runs a notebook under this process's backend, its trainings cut short."""
    return executed(
        path,
        folder,
        KERAS_MHA_QUICK="1",
        KERAS_BACKEND=keras.backend.backend(),
        IPYTHONDIR=str(folder / "ipython"),
    )


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What each code cell printed or returned as text, by the cell's id."""
    return {
        cell.id: "".join(_text(output) for output in cell.outputs)
        for cell in code_cells(notebook)
    }


def _text(output):
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return text if not output.get("data", {}).get("image/png") else ""


def pictures(notebook):
    """The PNG pictures of each code cell that drew any, as bytes, by the cell's id."""
    found = {}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            png = output.get("data", {}).get("image/png")
            if png:
                found.setdefault(cell.id, []).append(base64.b64decode(png))
    return found


def number_after(words, text):
    """The first number in a text that follows these words."""
    return float(re.search(re.escape(words) + r"\D*?(-?\d[\d.]*)", text).group(1))
